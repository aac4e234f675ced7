# Echoes the console until it reads Ctrl-D, then ends with the exclusive-or of all bytes as status. It asks for receive interrupts
# and raises DTR and RTS, as a driver does that listens, and polls all the same.
.include "tiny.inc"
.globl _start
_start:
    outb 1, COM1_IER
    outb 3, COM1_MCR
    xor  %ebx, %ebx
next:
    mov  $COM1_LSR, %dx
    in   %dx, %al
    test $1, %al
    jz   next
    mov  $COM1, %dx
    in   %dx, %al
    cmp  $4, %al
    je   done
    xor  %al, %bl
    putc
    jmp  next
done:
    mov  %bl, %al
    exit_al
