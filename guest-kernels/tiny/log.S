# Prints a panic that was another kernel's, and goes on for a while. Its own memory has no such line: there each '@' is a space.
# Ends with 7.
.include "tiny.inc"
.globl _start
_start:
    lea  log(%rip), %rsi
1:  lodsb
    test %al, %al
    jz   3f
    cmp  $'@', %al
    jne  2f
    mov  $' ', %al
2:  putc
    jmp  1b
3:  mov  $20000, %ecx
4:  in   $0x80, %al
    dec  %ecx
    jnz  4b
    mov  $7, %al
    exit_al

log:
    .ascii "[    0.123456] Kernel panic@- not syncing: tiny\r\n"
    .asciz "[    0.123789] ---[ end Kernel panic@- not syncing: tiny ]---\r\n"
