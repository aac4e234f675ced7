# Queues 256 requests, each of the 63.5 MiB that the device takes at most, to the disk in the first virtio-mmio window, and
# writes an S to the console. What then, the first letter of the command line says: 'h' halts, 'r' resets the disk and ends at once with 0, 'p' resets it, writes a P,
# waits for the reset's end, looks that nothing more is done, and ends with 0, 'm' writes mark 7 and an M and halts. The second letter says what the requests do: 'r' read, 'w' write.
# With an 'i', 'l' or 's' for the third it writes an R and waits for a byte of input before it tells the device; with an 'i' it
# waits for another one before it goes on as the first letter says; with an 's' each request has 512 pieces of a byte.
.include "tiny.inc"
.set VIRTIO,      0xd0000000
.set DESCRIPTORS, 0x200000
.set AVAILABLE,   0x201000
.set USED,        0x202000
.set HEADER,      0x203000
.set STATUS,      0x204000
.set TABLE,       0x210000      # of all requests: header, NDATA times the buffer, status
.set BUFFER,      0x400000
.set LEN,         0x40000       # 256 KiB, size_max
.set NDATA,       254           # seg_max
.set COUNT,       256
.globl _start
_start:
    lea  stack_top(%rip), %rsp
    mov  CMDLINE_PTR(%rsi), %ebx
    mov  $VIRTIO, %edi
    virtio_start COUNT, 1 << 9 | 1 << 28        # FLUSH, INDIRECT_DESC
    mov  $LEN, %r9d
    mov  $NDATA, %r10d
    cmpb $'s', 2(%rbx)
    jne  6f
    mov  $1, %r9d
    mov  $512, %r10d
6:  lea  2(%r10), %r11d         # bytes of the table
    shl  $4, %r11d
    xor  %ebp, %ebp
    cmpb $'w', 1(%rbx)
    sete %bpl                   # type: 0 reads, 1 writes
    mov  %ebp, HEADER
    movq $1 << 20, HEADER + 8   # sector: what minivmm itself has not read
    mov  $TABLE, %esi
    movq $HEADER, (%rsi)
    movl $16, 8(%rsi)
    movl $0x00010001, 12(%rsi)  # NEXT, which is 1
    neg  %ebp
    lea  3(, %rbp, 2), %ebp     # NEXT, and WRITE for a read
    mov  $1, %ecx
1:  add  $16, %esi
    movq $BUFFER, (%rsi)
    mov  %r9d, 8(%rsi)
    lea  1(%rcx), %eax
    shl  $16, %eax
    or   %ebp, %eax
    mov  %eax, 12(%rsi)
    inc  %ecx
    cmp  %r10d, %ecx
    jbe  1b
    add  $16, %esi
    movq $STATUS, (%rsi)
    movl $1, 8(%rsi)
    movl $2, 12(%rsi)           # WRITE
    mov  $DESCRIPTORS, %esi
    xor  %ecx, %ecx
2:  movq $TABLE, (%rsi)
    mov  %r11d, 8(%rsi)
    movl $4, 12(%rsi)           # INDIRECT
    mov  %cx, AVAILABLE + 4(, %rcx, 2)
    add  $16, %esi
    inc  %ecx
    cmp  $COUNT, %ecx
    jb   2b
    movw $COUNT, AVAILABLE + 2
    cmpb $'i', 2(%rbx)
    jb   7f                     # none
    outb 'R', COM1
    call wait_for_input
7:  movl $0, 0x50(%rdi)         # QueueNotify
    outb 'S', COM1
    cmpb $'h', (%rbx)
    je   halt
    cmpb $'i', 2(%rbx)
    jne  5f
    call wait_for_input
5:  cmpb $'m', (%rbx)
    jne  8f
    outb 7, MARK_PORT
    outb 'M', COM1
    jmp  halt
8:  movl $0, 0x70(%rdi)         # Status: the reset
    cmpb $'p', (%rbx)
    jne  done
    outb 'P', COM1
3:  cmpl $0, 0x70(%rdi)
    jne  3b
    # From here on the memory is the guest's.
    mov  $0x5a5a5a5a5a5a5a5a, %rax
    mov  $BUFFER, %edi
    mov  $0x10000 / 8, %ecx
    rep stosq
    mov  $BUFFER, %edi
    mov  $0x10000 / 8, %ecx
    repe scasq
    jne  fail
done:
    xor  %eax, %eax
    exit_al
wait_for_input:
    outb 1, COM1_IER            # or nothing comes
    outb 3, COM1_MCR
4:  mov  $COM1_LSR, %dx
    in   %dx, %al
    test $1, %al
    jz   4b
    mov  $COM1, %edx
    in   %dx, %al
    ret
halt:
    cli
    hlt
    jmp  halt
fail:
    mov  $99, %al
    exit_al
    .fill 512
stack_top:
