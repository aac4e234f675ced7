# Prints 'a', writes boot mark 7, prints 'b', writes boot mark 8, prints 'c' and powers off. A register and a word far up in memory
# must be behind the marks what they were before, the TSC later; else it ends with 99. With 'w' on its command line it
# writes pages of memory before the first mark, with 'm' it goes on to write marks 9 until it is stopped.
.include "tiny.inc"
.set WORD,  0xf00000
.set PAGES, 0x400000
.globl _start
_start:
    lea  stack_top(%rip), %rsp
    mov  CMDLINE_PTR(%rsi), %ebp
    mov  $0x1122334455667788, %rbx
    movl $41, WORD
    rdtsc
    shl  $32, %rdx
    or   %rdx, %rax
    mov  %rax, %r14
    mov  $'a', %al
    putc
    cmpb $'w', (%rbp)
    jne  2f
    mov  $PAGES, %edi
1:  mov  %rdi, (%rdi)
    add  $4096, %rdi
    cmp  $PAGES + 0x800000, %rdi
    jb   1b
2:  outb 7, MARK_PORT
    call check
    mov  $'b', %al
    putc
    outb 8, MARK_PORT
    call check
    mov  $'c', %al
    putc
    cmpb $'m', (%rbp)
    jne  4f
3:  outb 9, MARK_PORT
    jmp  3b
4:  poweroff
check:
    mov  $0x1122334455667788, %rax
    cmp  %rax, %rbx
    jne  wrong
    incl WORD
    cmpl $41, WORD
    jbe  wrong
    rdtsc
    shl  $32, %rdx
    or   %rdx, %rax
    cmp  %r14, %rax
    jbe  wrong
    ret
wrong:
    mov  $99, %al
    exit_al
    .fill 512
stack_top:
