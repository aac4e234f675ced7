# Does what the letters of its command line say, one after the other, until one of them ends the machine.
.include "tiny.inc"
.globl _start
_start:
    mov  CMDLINE_PTR(%rsi), %ebx
    dec  %rbx
next_letter:
    inc  %rbx
    mov  (%rbx), %al
    cmp  $'w', %al
    je   wait_for_key
    cmp  $'m', %al
    je   message
    cmp  $'b', %al
    je   boot_mark
    cmp  $'p', %al
    je   power_off
    cmp  $'r', %al
    je   acpi_reset
    cmp  $'k', %al
    je   keyboard_reset
    cmp  $'9', %al
    je   pci_reset
    cmp  $'c', %al
    je   pvpanic
    cmp  $'e', %al
    je   exit_status
    cmp  $'P', %al
    je   panic_line
    cmp  $'E', %al
    je   panic_end
    cmp  $'C', %al
    je   clock_on
    cmp  $'t', %al
    je   triple_fault
    cmp  $'h', %al
    je   halt
    cmp  $'i', %al
    je   idle
    cmp  $'s', %al
    je   spin
    outb 99, EXIT_PORT

wait_for_key:                   # asks for receive interrupts and raises RTS, as a driver does that listens, and polls
    outb 1, COM1_IER
    outb 3, COM1_MCR
1:  mov  $COM1_LSR, %dx
    in   %dx, %al
    test $1, %al
    jz   1b
    mov  $COM1, %dx
    in   %dx, %al
    jmp  next_letter
message:                        # words without an end of line, as a prompt is
    lea  words(%rip), %rsi
    puts_rsi
    jmp  next_letter
boot_mark:
    outb 7, MARK_PORT
    jmp  next_letter
power_off:
    poweroff
acpi_reset:
    outb 1, RESET_PORT
    hlt
keyboard_reset:
    outb 0xfe, 0x64
    hlt
pci_reset:
    outb 6, 0xcf9
    hlt
pvpanic:
    outb 1, PVPANIC_PORT
    hlt
exit_status:                    # "eN": the status is the character N itself
    mov  1(%rbx), %al
    exit_al
panic_line:                     # "Pr" is an early panic: the line, then the reset that panic=-1 makes
    lea  line(%rip), %rsi
    puts_rsi
    jmp  next_letter
panic_end:                      # "PEs" is a panic without panic=: the last line, then nothing any more
    lea  end_line(%rip), %rsi
    puts_rsi
    jmp  next_letter
clock_on:                       # kvm-clock, as it is on in a kernel that resets the machine because it has panicked
    mov  $0x4b564d01, %ecx      # MSR_KVM_SYSTEM_TIME_NEW
    mov  $0x300001, %eax        # at 3 MiB, enabled
    xor  %edx, %edx
    wrmsr
    jmp  next_letter
triple_fault:
    lidt no_idt(%rip)
    ud2
halt:
    cli
    hlt
    jmp  halt
idle:                           # nothing comes, for no device is told to
    sti
    hlt
    jmp  idle
spin:
    jmp  spin

words:
    .asciz "tiny# "
line:
    .asciz "[    0.123456] Kernel panic - not syncing: tiny\r\n"
end_line:
    .asciz "[    0.123789] ---[ end Kernel panic - not syncing: tiny ]---\r\n"
no_idt:
    .word 0
    .quad 0
