# Writes lines to the console without end, as fast as the console takes them.
.include "tiny.inc"
.globl _start
_start:
    lea  line(%rip), %rsi
    puts_rsi
    jmp  _start
line:
    .asciz "the quick brown fox jumps over the lazy dog\r\n"
