# Programs I/O APIC pin 4, turns the transmitter-empty interrupt of COM1 on and waits for it, halted. Ends with the vector. With 'm'
# on its command line, the pin is masked until the interrupt has come.
.include "tiny.inc"
.set VECTOR, 0x42
.set LAPIC,  0xfee00000
.set IOAPIC, 0xfec00000
.globl _start
_start:
    lea  stack_top(%rip), %rsp
    mov  CMDLINE_PTR(%rsi), %ebx
    set_gate VECTOR, handler
    mov  $LAPIC, %edi
    movl $0x1ff, 0xf0(%rdi)     # spurious vector 0xff, APIC on
    mov  $IOAPIC, %edi
    movl $0x10 + 2 * 4 + 1, (%rdi)
    movl $0, 0x10(%rdi)         # to APIC 0
    movl $0x10 + 2 * 4, (%rdi)
    cmpb $'m', (%rbx)
    je   2f
    movl $VECTOR, 0x10(%rdi)    # fixed, physical, edge, unmasked
2:  outb 0x0b, COM1 + 4         # DTR, RTS, OUT2
    outb 2, COM1_IER
    movl $VECTOR, 0x10(%rdi)
1:  sti
    hlt
    jmp  1b
handler:
    mov  $VECTOR, %al
    exit_al

    idt_space
    .fill 512
stack_top:
