# Drives the entropy device in the first virtio-mmio window by hand, as the first letter of the command line says:
#   o  one request; ends with the length that the device wrote, 64
#   b  a head beyond the table; ends with the device status in which the device asks for a reset, 79
#   r  resets with requests in flight, and floods of notifications, 200 times; then as o
.include "tiny.inc"
.set VECTOR,      0x42
.set LAPIC,       0xfee00000
.set IOAPIC,      0xfec00000
.set PIN,         5
.set VIRTIO,      0xd0000000
.set DESCRIPTORS, 0x200000
.set AVAILABLE,   0x201000
.set USED,        0x202000
.set BUFFER,      0x203000
.globl _start
_start:
    lea  stack_top(%rip), %rsp
    mov  CMDLINE_PTR(%rsi), %eax
    movzbl (%rax), %ebx         # the letter
    set_gate VECTOR, handler
    mov  $LAPIC, %edi
    movl $0x1ff, 0xf0(%rdi)     # spurious vector 0xff, APIC on
    mov  $IOAPIC, %edi
    movl $0x10 + 2 * PIN + 1, (%rdi)
    movl $0, 0x10(%rdi)         # to APIC 0
    movl $0x10 + 2 * PIN, (%rdi)
    movl $VECTOR, 0x10(%rdi)    # fixed, physical, edge, unmasked
    mov  $VIRTIO, %edi
    cmp  $'r', %bl
    jne  3f

    mov  $200, %ebp
1:  call start
    call offer
    mov  $50, %ecx
2:  movl $0, 0x50(%rdi)         # QueueNotify
    loop 2b
    movl $0, 0x70(%rdi)
    cmpl $0, 0x70(%rdi)
    jne  fail
    dec  %ebp
    jnz  1b

3:  call start
    cmp  $'b', %bl
    jne  4f
    movw $999, AVAILABLE + 4
4:  call offer
    movl $0, 0x50(%rdi)
5:  sti
    hlt
    jmp  5b

handler:
    mov  0x60(%rdi), %eax       # InterruptStatus
    test %eax, %eax
    jz   6f                     # of a request that a reset has ended
    mov  %eax, 0x64(%rdi)       # InterruptACK
    cmp  $'b', %bl
    je   8f
    cmp  $1, %eax
    jne  fail
    cmpw $1, USED + 2
    jne  6f
    # 64 random bytes are not all zero.
    xor  %eax, %eax
    mov  $64, %ecx
7:  or   BUFFER - 1(%rcx), %al
    loop 7b
    test %al, %al
    jz   fail
    mov  USED + 8, %eax
    exit_al
6:  mov  $LAPIC, %ecx
    movl $0, 0xb0(%rcx)         # end of interrupt
    iretq
8:  cmp  $2, %eax
    jne  fail
    mov  0x70(%rdi), %eax
    exit_al

fail:
    mov  $99, %al
    exit_al

# From the reset to DRIVER_OK, with empty rings.
start:
    virtio_start 8, 0
    movl $0, BUFFER
    movq $BUFFER, DESCRIPTORS
    movl $64, DESCRIPTORS + 8
    movl $2, DESCRIPTORS + 12   # WRITE
    movw $0, AVAILABLE + 4
    ret

# Makes the head in the ring's first entry available.
offer:
    movw $1, AVAILABLE + 2
    ret

    idt_space
    .fill 512
stack_top:
