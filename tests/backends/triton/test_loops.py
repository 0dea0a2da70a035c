"""Loops of a disassembly: the natural ones, and what is in the innermost that multiply."""

from __future__ import annotations

from backends.triton import loops

#: an outer loop with a product and a spill around an inner one, whose wait is at the end and jumps back into it
SASS = """
.text.kernel:
        /*0000*/                   STL [R1], R2 ;
.L_x_0:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/                   LDL R3, [R1] ;
.L_x_1:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*0040*/              @!P0 BRA `(.L_x_4) ;
.L_x_2:
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/                   LDL.LU R7, [R1+0x4] ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*00a0*/                   LDL R9, [R1+0x8] ;
        /*00b0*/               @P5 EXIT ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*00e0*/              @!P0 BRA `(.L_x_4) ;
        /*00f0*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*0100*/                   BRA `(.L_x_5);
        /*0110*/                   NOP;
"""
AMDGCN = """
	.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
kernel:                                 ; @kernel
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	s_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
	scratch_load_dword v20, off, s33 offset:4 ; 4-byte Folded Reload
	s_cbranch_scc0 .LBB0_1
	s_branch .LBB0_3
.LBB0_2:
	scratch_store_dword off, v20, s33       ; 4-byte Folded Spill
.LBB0_3:
	s_endpgm
"""


def hot(text: str, dialect: loops.Dialect, instruction: str) -> list[str]:
    return [
        line.split()[0] for line in loops.hot(loops.blocks(text, dialect), lambda line: instruction in line)
    ]


def test_the_innermost_loop_with_products_and_its_wait():
    opcodes = hot(SASS, loops.SASS, "HGMMA")
    assert opcodes.count("HGMMA.64x128x16.F32.BF16") == 1 and opcodes.count("LDL.LU") == 1
    assert opcodes.count("SYNCS.PHASECHK.TRANS64.TRYWAIT") == 2  # the one at the end belongs to it
    assert "LDL" not in opcodes and "STL" not in opcodes  # around the loop, and after it


def test_without_products_every_loop_counts():
    opcodes = hot(SASS, loops.SASS, "DMMA")
    assert (
        opcodes.count("LDL") == 1 and "LDL.LU" in opcodes and "STL" not in opcodes
    )  # after the loops it does not


def test_amd():
    assert hot(AMDGCN, loops.AMDGCN, "v_mfma") == [
        "v_mfma_f32_32x32x8_bf16_1k",
        "scratch_load_dword",
        "s_cbranch_scc0",
    ]


def test_code_without_loops_has_no_hot_part():
    assert hot("k:\n\ts_endpgm\n", loops.AMDGCN, "v_mfma") == []
