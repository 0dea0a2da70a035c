"""Resources of the processors."""

#: shared memory that one program can have, in bytes
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
#: columns of tensor memory
TENSOR_COLUMNS = 512
