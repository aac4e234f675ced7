# hello.S for monitors that enter ELF kernels by PVH, in 32-bit protected mode: the start-up benchmark's guest for QEMU.
.include "tiny.inc"
.set GED_SLEEP, 0xfea00200      # sleep control of QEMU's microvm, in its generic event device
.code32
.globl _start
_start:
    outb '!', COM1
    outb 0x34, SLEEP_PORT
    movb $0x34, GED_SLEEP
    lidt no_idt                 # neither is there: a reset
    ud2
no_idt:
    .word 0
    .long 0

.section .note.Xen, "a", @note
    .long 4, 4, 18              # lengths of name and entry, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long _start
