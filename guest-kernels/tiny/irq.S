# Programs I/O APIC pin 4, turns the transmitter-empty interrupt of COM1 on and waits for it, halted. Ends with the vector.
.include "tiny.inc"
.set VECTOR, 0x42
.set LAPIC,  0xfee00000
.set IOAPIC, 0xfec00000
.globl _start
_start:
    lea  stack_top(%rip), %rsp
    # The IDT is made at run time: a gate's address comes in three pieces.
    lea  handler(%rip), %rax
    lea  idt + VECTOR * 16(%rip), %rdi
    mov  %ax, (%rdi)
    mov  %cs, %cx
    mov  %cx, 2(%rdi)
    movw $0x8e00, 4(%rdi)
    shr  $16, %rax
    mov  %ax, 6(%rdi)
    shr  $16, %rax
    mov  %eax, 8(%rdi)
    lea  idt(%rip), %rax
    mov  %rax, idtr + 2(%rip)
    lidt idtr(%rip)

    mov  $LAPIC, %edi
    movl $0x1ff, 0xf0(%rdi)     # spurious vector 0xff, APIC on
    mov  $IOAPIC, %edi
    movl $0x10 + 2 * 4 + 1, (%rdi)
    movl $0, 0x10(%rdi)         # to APIC 0
    movl $0x10 + 2 * 4, (%rdi)
    movl $VECTOR, 0x10(%rdi)    # fixed, physical, edge, unmasked
    outb 0x0b, COM1 + 4         # DTR, RTS, OUT2
    outb 2, COM1_IER
1:  sti
    hlt
    jmp  1b
handler:
    mov  $VECTOR, %al
    exit_al

    .align 16
idtr:
    .word 4095
    .quad 0
    .align 16
idt:
    .fill 4096
    .fill 512
stack_top:
