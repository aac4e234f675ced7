# Reads the first sector of the disk in the first virtio-mmio window as often as the number on its command line says, one request
# at a time with a notification each; mark 7 comes behind the first. Ends with 0 if all succeed.
.include "tiny.inc"
.set VIRTIO,      0xd0000000
.set DESCRIPTORS, 0x200000
.set AVAILABLE,   0x201000
.set USED,        0x202000
.set HEADER,      0x203000      # zero: a read of sector 0
.set BUFFER,      0x204000
.set STATUS,      0x205000
.globl _start
_start:
    mov  CMDLINE_PTR(%rsi), %esi
    xor  %ebp, %ebp
1:  lodsb
    sub  $'0', %al
    cmp  $9, %al
    ja   2f
    movzbl %al, %eax
    imul $10, %ebp
    add  %eax, %ebp
    jmp  1b

2:  mov  $VIRTIO, %edi
    virtio_start 8, 1 << 9      # FLUSH: a driver without it gets no io_uring
    movq $HEADER, DESCRIPTORS
    movl $16, DESCRIPTORS + 8
    movl $0x10001, DESCRIPTORS + 12     # NEXT, the second one
    movq $BUFFER, DESCRIPTORS + 16
    movl $512, DESCRIPTORS + 24
    movl $0x20003, DESCRIPTORS + 28     # NEXT and WRITE, the third one
    movq $STATUS, DESCRIPTORS + 32
    movl $1, DESCRIPTORS + 40
    movl $2, DESCRIPTORS + 44           # WRITE
    xor  %ebx, %ebx
    # Every entry of the available ring is zero, which is the chain's head.
3:  cmp  %ebp, %ebx
    je   5f
    movb $0xff, STATUS
    inc  %ebx
    mov  %bx, AVAILABLE + 2
    movl $0, 0x50(%rdi)         # QueueNotify
4:  pause
    cmp  %bx, USED + 2
    jne  4b
    cmpb $0, STATUS
    jne  fail
    cmp  $1, %ebx
    jne  3b
    outb 7, MARK_PORT
    jmp  3b
fail:
    mov  $99, %al
    exit_al

5:  xor  %eax, %eax
    exit_al
