//! Names and paths of xenstore nodes, as Xen's `public/io/blkif.h` and libxl write them.
