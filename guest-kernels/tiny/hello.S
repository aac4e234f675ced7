# Prints one byte and powers off: the least that a guest can do. The start-up benchmark boots it.
.include "tiny.inc"
.globl _start
_start:
    outb '!', COM1
    poweroff
