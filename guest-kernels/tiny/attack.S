# A guest that has broken out, for builds of minivmm with the feature attack-port (tests/attack/port.rs). The first letter of the
# command line says what to call, the second one in which thread; minivmm ends it. With an 'e' for the third it ends with 5
# after having told the port, which is all that there is to do where there is no such port; with an 'h' it starts no devices.
.include "tiny.inc"
.set ATTACK_PORT, 0xfa
.set DISK,        0xd0000000
.set RNG,         0xd0001000
.set DESCRIPTORS, 0x200000
.set AVAILABLE,   0x201000
.set USED,        0x202000
.globl _start
_start:
    mov  CMDLINE_PTR(%rsi), %ebx
    mov  (%rbx), %ax
    mov  $ATTACK_PORT, %dx
    out  %ax, %dx
    cmpb $'e', 2(%rbx)
    jne  1f
    mov  $5, %al
    exit_al
    # Each thread has something to do now.
1:  outb 1, MARK_PORT
    outb '!', COM1
    cmpb $'h', 2(%rbx)
    je   2f
    mov  $DISK, %edi
    virtio_start 8, 0
    mov  $RNG, %edi
    virtio_start 8, 0
2:  hlt
    jmp  2b
fail:
    mov  $99, %al
    exit_al
