//! The command line of minivmm.

fn main() {}
