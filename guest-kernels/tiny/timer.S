# Arms the local APIC's TSC deadline, writes boot mark 7 and halts until the timer goes off; then it prints 't' and ends with 5. With
# 'p' on its command line the deadline has passed, with interrupts off, when it writes the mark.
.include "tiny.inc"
.set VECTOR, 0x42
.set LAPIC,  0xfee00000
.set TSC_DEADLINE, 0x6e0
.globl _start
_start:
    lea  stack_top(%rip), %rsp
    mov  CMDLINE_PTR(%rsi), %ebp
    set_gate VECTOR, handler
    mov  $LAPIC, %edi
    movl $0x1ff, 0xf0(%rdi)     # spurious vector 0xff, APIC on
    movl $0x40000 + VECTOR, 0x320(%rdi)
    mfence
    rdtsc
    shl  $32, %rdx
    or   %rdx, %rax
    mov  $20000000, %esi
    add  %rsi, %rax
    mov  %rax, %rbx
    mov  %rax, %rdx
    shr  $32, %rdx
    mov  $TSC_DEADLINE, %ecx
    wrmsr
    cmpb $'p', (%rbp)
    jne  2f
    add  %rsi, %rbx
1:  pause
    rdtsc
    shl  $32, %rdx
    or   %rdx, %rax
    cmp  %rbx, %rax
    jb   1b
2:  outb 7, MARK_PORT
3:  sti
    hlt
    jmp  3b
handler:
    mov  $'t', %al
    putc
    mov  $5, %al
    exit_al

    idt_space
    .fill 512
stack_top:
