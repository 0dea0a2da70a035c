// Attention backward with bfloat16 products on the tile registers; other problems go to the AVX-512 kernels.
#define AAJR_AMX_PRODUCTS
#include "attention_backward.cpp"
