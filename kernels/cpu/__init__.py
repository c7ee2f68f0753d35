"""What the native kernels share: their build, the CPU's features, and C++ headers."""
