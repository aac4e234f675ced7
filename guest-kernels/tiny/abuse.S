# Does what no kernel would, in the way that the first letter of its command line names.
.include "tiny.inc"
.set LAPIC,  0xfee00000
.set IOAPIC, 0xfec00000
.set VECTOR, 0x42
.set AP_PAGE, 0x8000            # free, and below 1 MiB, where an AP starts
.set AP_HERE, 0x8ff0
.globl _start
_start:
    lea  stack_top(%rip), %rsp
    mov  CMDLINE_PTR(%rsi), %ebx
    mov  (%rbx), %al
    cmp  $'w', %al
    je   wide_exit
    cmp  $'s', %al
    je   long_string
    cmp  $'o', %al
    je   overwrite
    cmp  $'i', %al
    je   odd_interrupts
    cmp  $'m', %al
    je   msrs
    cmp  $'b', %al
    je   marks_for_ever
    cmp  $'2', %al
    je   two_at_once
    outb 99, EXIT_PORT

wide_exit:                      # four bytes to the port of one, as for QEMU's isa-debug-exit
    mov  $0x11223307, %eax
    mov  $EXIT_PORT, %dx
    out  %eax, %dx
    hlt

long_string:                    # one string instruction, of more than KVM's one page at a time
    lea  text(%rip), %rsi
    mov  $10000, %ecx
    mov  $COM1, %dx
    cld
    rep outsb
    poweroff

overwrite:                      # from the end of the MP table down over ACPI and command line to the page tables in use
    lidt no_idt(%rip)
    std
    mov  $0xffff8, %edi
    mov  $0x100000 / 8, %ecx
    mov  $-1, %rax
    rep stosq
    hlt

odd_interrupts:                 # delivery modes that no device has, edge and level; then one that must arrive, by level
    set_gate VECTOR, arrived
    mov  $LAPIC, %edi
    movl $0x1ff, 0xf0(%rdi)     # spurious vector 0xff, APIC on
    mov  $IOAPIC, %edi
    movl $0x10 + 2 * 4 + 1, (%rdi)
    movl $0, 0x10(%rdi)         # to APIC 0
    movl $0x10 + 2 * 4, (%rdi)
    outb 0x0b, COM1 + 4         # DTR, RTS, OUT2
    lea  modes(%rip), %rsi
1:  mov  (%rsi), %eax
    test %eax, %eax
    jz   2f
    mov  %eax, 0x10(%rdi)
    outb 0, COM1_IER            # the transmitter is empty: an interrupt at once
    outb 2, COM1_IER
    add  $4, %rsi
    jmp  1b
2:  sti
    hlt
    jmp  2b
arrived:
    mov  $VECTOR, %al
    exit_al

msrs:                           # reads those around every block there is, and writes one that is in none
    set_gate 13, general_protection
    lea  blocks(%rip), %rsi
1:  mov  (%rsi), %ecx
    mov  4(%rsi), %ebx
    test %ebx, %ebx
    jz   3f
2:  rdmsr
    inc  %ecx
    dec  %ebx
    jnz  2b
    add  $8, %rsi
    jmp  1b
3:  xor  %edi, %edi             # counts faults
    mov  $0xdeadbeef, %ecx
    wrmsr
    rdmsr
    mov  %edi, %eax             # both faulted, unless the host's KVM ignores unknown MSRs
    exit_al
general_protection:             # passes over the two bytes of RDMSR and WRMSR
    add  $8, %rsp
    addq $2, (%rsp)
    inc  %edi
    iretq

marks_for_ever:                 # each is a line in the log of -v
    outb 1, MARK_PORT
    jmp  marks_for_ever

two_at_once:                    # an AP in real mode and this processor flood the marks, and each ends the VM
    cld
    lea  ap(%rip), %rsi
    mov  $AP_PAGE, %edi
    mov  $ap_end - ap, %ecx
    rep movsb
    mov  $LAPIC, %edi
    movl $0x1ff, 0xf0(%rdi)
    movl $0xc4500, 0x300(%rdi)  # INIT to all others
    mov  $100000, %ecx
1:  pause
    loop 1b
    movl $0xc4600 + AP_PAGE / 0x1000, 0x300(%rdi)
2:  pause
    cmpb $1, AP_HERE
    jne  2b
    mov  $2000, %ecx
3:  outb 1, MARK_PORT
    loop 3b
    outb 7, EXIT_PORT
    hlt
    .code16
ap: mov  $AP_HERE - AP_PAGE, %bx
    movb $1, %cs:(%bx)
    mov  $2000, %cx
4:  outb 2, MARK_PORT
    loop 4b
    outb 7, EXIT_PORT
    hlt
ap_end:
    .code64

modes:                          # SMI edge and level, reserved, ExtINT, reserved, a vector below 16; then fixed, level
    .long 0x200, 0x8200, 0x8300, 0x700, 0x8700, 0x8600, 0x01, 0x8000 + VECTOR, 0
blocks:
    .long 0, 0x2000, 0x40000000, 0x200, 0x4b564cf0, 0x40, 0xc0000000, 0x400, 0xc0010000, 0x400, 0, 0
no_idt:
    .word 0
    .quad 0
    idt_space
    .fill 512
stack_top:
text:
    .fill 10000, 1, 'x'
