//! What this host and this kernel file can and cannot do, with the mend.
