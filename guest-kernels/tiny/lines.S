# Writes 65536 numbered lines of 9 bytes, then powers off, or with "r" on its command line resets: for slow readers, who must
# get every one.
.include "tiny.inc"
.globl _start
_start:
    mov  CMDLINE_PTR(%rsi), %ebp
    xor  %ebx, %ebx
next:
    mov  %ebx, %ecx
    mov  $8, %edi
digit:
    rol  $4, %ecx
    mov  %ecx, %eax
    and  $0xf, %eax
    lea  digits(%rip), %rsi
    mov  (%rsi,%rax), %al
    putc
    dec  %edi
    jnz  digit
    mov  $'\n', %al
    putc
    inc  %ebx
    cmp  $0x10000, %ebx
    jb   next
    cmpb $'r', (%rbp)
    je   reset
    poweroff
reset:
    outb 1, RESET_PORT
    hlt
digits:
    .ascii "0123456789abcdef"
