//! Where the guest's serial console goes on the host: terminal, pty, file or nowhere.
