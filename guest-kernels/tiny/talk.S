# Echoes the console by interrupts alone, as a driver does: halted in between, it never looks at the UART unless that has
# interrupted. Ends with 0 at Ctrl-D, when all is sent.
.include "tiny.inc"
.set VECTOR, 0x42
.set LAPIC,  0xfee00000
.set IOAPIC, 0xfec00000
.globl _start
_start:
    lea  stack_top(%rip), %rsp
    set_gate VECTOR, handler
    mov  $LAPIC, %edi
    movl $0x1ff, 0xf0(%rdi)     # spurious vector 0xff, APIC on
    mov  $IOAPIC, %esi
    movl $0x10 + 2 * 4 + 1, (%rsi)
    movl $0, 0x10(%rsi)         # to APIC 0
    movl $0x10 + 2 * 4, (%rsi)
    movl $VECTOR, 0x10(%rsi)    # fixed, physical, edge, unmasked
    lea  ring(%rip), %rbx
    xor  %r9d, %r9d             # bytes put into the ring, and taken out: their low 16 bits are the places
    xor  %r10d, %r10d
    xor  %r11d, %r11d           # whether Ctrl-D has come
    outb 1, COM1 + 2            # FIFOs
    outb 0x0b, COM1_MCR         # DTR, RTS, OUT2
    outb 1, COM1_IER
    outb '!', COM1
1:  sti
    hlt
    jmp  1b

# All registers are its own: nothing else runs.
handler:
    mov  $COM1 + 2, %dx
    in   %dx, %al
    test $1, %al                # nothing to say
    jnz  leave
receive:
    mov  $COM1_LSR, %dx
    in   %dx, %al
    test $1, %al
    jz   send
    mov  $COM1, %dx
    in   %dx, %al
    cmp  $4, %al
    je   end_of_input
    movzwl %r9w, %ecx
    mov  %al, (%rbx,%rcx)
    inc  %r9d
    jmp  receive
end_of_input:
    inc  %r11d
    jmp  receive
send:
    cmp  %r9d, %r10d
    je   sent
    outb 3, COM1_IER            # an interrupt when there is room
    mov  $16, %r12d
1:  mov  $COM1_LSR, %dx
    in   %dx, %al
    test $0x20, %al
    jz   handler
    movzwl %r10w, %ecx
    mov  (%rbx,%rcx), %al
    mov  $COM1, %dx
    out  %al, %dx
    inc  %r10d
    cmp  %r9d, %r10d
    je   sent
    dec  %r12d
    jnz  1b
    jmp  handler
sent:
    test %r11d, %r11d
    jnz  done
    outb 1, COM1_IER
    jmp  handler
leave:
    movl $0, 0xb0(%rdi)         # EOI
    iretq
done:
    xor  %eax, %eax
    exit_al

    idt_space
    .fill 512
stack_top:
    .lcomm ring, 65536
