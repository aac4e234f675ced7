# Reads and writes every I/O port that is no way out, in every width, one by one and as strings, then addresses without RAM;
# where no device is, all ones must come back. Ends with 0, or with the number of the check that failed.
.include "tiny.inc"
.globl _start
_start:
    lea  stack_top(%rip), %rsp
    cld
    xor  %ebx, %ebx             # the port
next_port:
    mov  %ebx, %edx
    call is_way_out
    jc   skip_port
    # 0x3f8 to 0x3ff, 0x60 to 0x64, 0xcf8 to 0xcff are devices: they may answer anything.
    in   %dx, %al
    in   %dx, %ax
    in   %dx, %eax
    lea  buffer(%rip), %rdi
    mov  $3, %ecx
    rep insb
    mov  $3, %ecx
    rep insl
    xor  %eax, %eax
    out  %al, %dx
    out  %ax, %dx
    out  %eax, %dx
    lea  buffer(%rip), %rsi
    mov  $3, %ecx
    rep outsb
    mov  $3, %ecx
    rep outsw
skip_port:
    add  $1, %ebx
    cmp  $0x10000, %ebx
    jb   next_port

    # No device at port 0x80: all ones, in every width.
    mov  $0x80, %dx
    mov  $1, %bl
    xor  %eax, %eax
    in   %dx, %eax
    cmp  $-1, %eax
    jne  fail
    lea  buffer(%rip), %rdi
    movq $0, (%rdi)
    mov  $4, %ecx
    rep insw
    mov  $2, %bl
    cmpq $-1, buffer(%rip)
    jne  fail

    # Holes in the address space: behind RAM, at the gap, around the I/O APIC, at its end.
    mov  $3, %bl
    lea  holes(%rip), %rsi
next_hole:
    mov  (%rsi), %rdi
    test %rdi, %rdi
    jz   ioapic
    movb $0x5a, (%rdi)
    movl $0x5a5a5a5a, (%rdi)
    movq %rdi, (%rdi)
    mov  (%rdi), %rax
    cmp  $-1, %rax
    jne  fail
    add  $8, %rsi
    jmp  next_hole

ioapic:                         # any offset, any width: it may answer anything
    mov  $0xfec00000, %edi
    mov  $0x1000 / 4, %ecx
next_register:
    movb $0xff, (%rdi)
    movb 1(%rdi), %al
    movw %ax, 2(%rdi)
    mov  (%rdi), %eax
    movq %rdi, (%rdi)
    add  $4, %rdi
    loop next_register
    xor  %eax, %eax
    exit_al
fail:
    mov  %bl, %al
    exit_al

# Carry: DX is within a 4-byte access of a port whose write ends the VM.
is_way_out:
    push %rbx
    lea  ways_out(%rip), %rsi
1:  movzwl (%rsi), %ebx
    test %ebx, %ebx
    jz   2f
    mov  %edx, %eax
    sub  %ebx, %eax
    add  $4, %eax
    cmp  $5, %eax               # from 4 below to the port itself
    jb   3f
    add  $2, %rsi
    jmp  1b
2:  pop  %rbx
    clc
    ret
3:  pop  %rbx
    stc
    ret

ways_out:
    .word EXIT_PORT, 0x64, PVPANIC_PORT, SLEEP_PORT, RESET_PORT, 0xcf9, 0
holes:
    .quad 0xbffff000, 0xc0000000, 0xd0000000, 0xfebffff8, 0xfec01000, 0xfed00000, 0xfff00000, 0xfffffff8, 0
    .align 16
buffer:
    .fill 64
    .fill 512
stack_top:
