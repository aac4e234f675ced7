//! Device models of minivmm.
