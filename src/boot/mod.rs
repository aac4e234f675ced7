//! Loading kernels and initramfs images into guest memory.
