# Queues 64 chains of nearly 4 GiB each for hvc0 to send, all of the same memory, then halts. With an 'm' on the command line each
# has the mebibyte that the device takes.
.include "tiny.inc"
.set VIRTIO,      0xd0000000
.set DESCRIPTORS, 0x200000
.set AVAILABLE,   0x201000
.set USED,        0x202000
.set TABLE,       0x210000
.set BUFFER,      0x400000
.set BUFFER_LEN,  0x400000
.set CHAIN_LEN,   1000
.set CHAINS,      64
.globl _start
_start:
    mov  CMDLINE_PTR(%rsi), %ebx
    mov  $VIRTIO, %edi
    virtio_start CHAINS, 1 << 28, 1     # INDIRECT_DESC, transmitq
    mov  $TABLE, %esi
    xor  %ecx, %ecx
1:  movq $BUFFER, (%rsi)
    movl $BUFFER_LEN, 8(%rsi)
    lea  1(%rcx), %eax
    shl  $16, %eax
    or   $1, %eax               # NEXT, and which
    mov  %eax, 12(%rsi)
    add  $16, %esi
    inc  %ecx
    cmp  $CHAIN_LEN, %ecx
    jb   1b
    movl $0, -4(%rsi)           # the last has none
    cmpb $'m', (%rbx)
    jne  4f
    movl $1 << 20, TABLE + 8
    movl $0, TABLE + 12
4:

    mov  $DESCRIPTORS, %esi
    xor  %ecx, %ecx
2:  movq $TABLE, (%rsi)
    movl $16 * CHAIN_LEN, 8(%rsi)
    movl $4, 12(%rsi)           # INDIRECT
    mov  %cx, AVAILABLE + 4(, %rcx, 2)
    add  $16, %esi
    inc  %ecx
    cmp  $CHAINS, %ecx
    jb   2b
    movw $CHAINS, AVAILABLE + 2
    movl $1, 0x50(%rdi)         # QueueNotify
    cli
3:  hlt
    jmp  3b
fail:
    mov  $99, %al
    exit_al
