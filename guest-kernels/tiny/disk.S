# Resets the disk in the first virtio-mmio window with requests in flight, time and again, then writes it and reads it back. Ends
# with 0 if nothing happens after a reset, and what is read is what was written. Marks 7 and 8 come between the write and two
# readings.
.include "tiny.inc"
.set VIRTIO,      0xd0000000
.set DESCRIPTORS, 0x200000
.set AVAILABLE,   0x201000
.set USED,        0x202000
.set HEADERS,     0x203000      # 16 bytes each
.set STATUSES,    0x204000      # a byte each
.set BUFFERS,     0x300000
.set LEN,         0x400         # of a buffer, two sectors
.set COUNT,       64            # of requests; each takes three descriptors
.set FILL,        0x5a5a5a5a5a5a5a5a
.globl _start
_start:
    lea  stack_top(%rip), %rsp
    mov  $100, %ebp
1:  call fill
    call submit
    mov  %ebp, %eax
    and  $0x38, %eax            # at once, or when so many of them are done
2:  cmp  USED + 2, %ax
    ja   2b
    movl $0, 0x70(%rdi)         # Status: the reset, which takes its time
3:  cmpl $0, 0x70(%rdi)
    jne  3b
    mov  USED + 2, %bx
    call fill
    call check
    cmp  USED + 2, %bx
    jne  fail
    dec  %ebp
    jnz  1b

    mov  $-1, %ebp
    call submit
    call finish
    outb 7, MARK_PORT
    call read_back
    outb 8, MARK_PORT
    call read_back
    xor  %eax, %eax
    exit_al

read_back:
    xor  %eax, %eax
    call fill_with
    xor  %ebp, %ebp
    call submit
    call finish
    jmp  check

fail:
    mov  $99, %al
    exit_al

# Makes a request for each buffer available, at once after a reset: a write if its bit of EBP is set, a read if not.
submit:
    mov  $VIRTIO, %edi
    virtio_start 256, 1 << 9    # FLUSH: a driver without it gets no io_uring
    xor  %ecx, %ecx
    mov  $DESCRIPTORS, %esi
    mov  $HEADERS, %edx
    mov  $BUFFERS, %r8d
3:  xor  %eax, %eax
    bt   %ecx, %ebp
    setc %al
    mov  %eax, (%rdx)           # type: 0 reads, 1 writes
    mov  %ecx, %r9d
    shl  $1, %r9d
    mov  %r9, 8(%rdx)           # sector
    lea  (%rcx, %rcx, 2), %r9d
    mov  %r9w, AVAILABLE + 4(, %rcx, 2)
    mov  %rdx, (%rsi)
    movl $16, 8(%rsi)
    movw $1, 12(%rsi)           # NEXT
    inc  %r9d
    mov  %r9w, 14(%rsi)
    mov  %r8, 16(%rsi)
    movl $LEN, 24(%rsi)
    neg  %eax
    lea  3(, %rax, 2), %eax     # NEXT, and WRITE for a read
    mov  %ax, 28(%rsi)
    inc  %r9d
    mov  %r9w, 30(%rsi)
    lea  STATUSES(%rcx), %eax
    movb $0xff, (%rax)
    mov  %rax, 32(%rsi)
    movl $1, 40(%rsi)
    movl $2, 44(%rsi)           # WRITE
    add  $3 * 16, %esi
    add  $16, %edx
    add  $LEN, %r8d
    inc  %ecx
    cmp  $COUNT, %ecx
    jb   3b
    movw $COUNT, AVAILABLE + 2
    movl $0, 0x50(%rdi)         # QueueNotify
    ret

# Waits for the requests, all of which must succeed.
finish:
    pause
    cmpw $COUNT, USED + 2
    jne  finish
    xor  %eax, %eax
    mov  $STATUSES, %edi
    mov  $COUNT / 8, %ecx
    repe scasq
    jne  fail
    ret

fill:
    mov  $FILL, %rax
fill_with:
    mov  $BUFFERS, %edi
    mov  $COUNT * LEN / 8, %ecx
    rep stosq
    ret

check:
    mov  $FILL, %rax
    mov  $BUFFERS, %edi
    mov  $COUNT * LEN / 8, %ecx
    repe scasq
    jne  fail
    ret

    .fill 512
stack_top:
