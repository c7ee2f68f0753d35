"""BatchNorm and ReLU as `bn_relu` and `conv_stem` share them."""
