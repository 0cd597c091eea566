"""Triton kernels of the mask decoder: what `FastDecoder` does to image tokens between two products with weights.

A prompt's T tokens, 8 at most, stand in 64 rows, token t of head h in row 8 h + t; rows without a token are zeros.
A map that each head has of its own, from 128 channels in 8 heads, is a matrix with blocks on its diagonal and
zeros elsewhere: a larger product, which tensor cores do in one piece. Products are summed in float32; rows are
stored in their own type. Letters are those of `pipeline.model.decoder`; i rows of tokens, o rows of image tokens,
c channels of heads, p places of a block.
"""

import triton
import triton.language as tl


@triton.jit
def update(
    keys_N64c,
    values_N64c,
    through_N64o,
    gram_N6464,
    constants_N65,
    cross_N64o,
    old_values_Noc,
    old_gram_Noo,
    old_constants_No,
    scale_NL,
    rows_NrL,
    queries_cL,
    queries_rest_cL,
    dots_cL,
    constant_dots_L,
    old_dots_cL,
    old_constant_dots_L,
    energy_L,
    new_scale_NL,
    new_rows_NrL,
    places,
    eps,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Image tokens of a prompt and a block of places read from the prompt's tokens, and are normalised.

    With Y = s U + Bᵀ R, B of the old rows, of the tokens' and of a constant, |Y|² is s² |U|² and, for each row,
    R (2 s B U + B Bᵀ R). Program ids: prompt, block.

    Args:
        keys_N64c: Of the tokens, by head, divided by the root of their length.
        values_N64c: Of the tokens, by head.
        through_N64o: Keys times the queries of the old basis.
        gram_N6464: Products of the tokens' basis with itself.
        constants_N65: Products of the constant with the tokens' basis, and with itself.
        cross_N64o: Twice the products of the tokens' basis with the old one.
        old_values_Noc: Of the tokens of the layer before, by head; the last of ROWS is a constant's.
        old_gram_Noo: Products of the old basis with itself.
        old_constants_No: Products of the constant with the old basis.
        scale_NL: s; not read where ROWS is 0, where it is 1.
        rows_NrL: R of the old basis.
        queries_cL: Of U; with the rest where ROWS is 0.
        queries_rest_cL: Of what is not scaled.
        dots_cL: Products of U with the basis that values become.
        constant_dots_L: Products of U with the constant.
        old_dots_cL: As `dots_cL`, of the layer before.
        old_constant_dots_L: As `constant_dots_L`, of the layer before.
        energy_L: |U|².
        new_scale_NL: Filled.
        new_rows_NrL: Filled: the old ones, 8 x TOKENS of the tokens, the constant's.
        places: L.
        eps: Of the normalisation.
        TOKENS: T.
        ROWS: Of the old basis.
        PADDED_ROWS: A power of two, 16 at least.
        CHANNELS: C.
        BLOCK: Places.
    """
    n = tl.program_id(0).to(tl.int64)
    i, o, c = tl.arange(0, 64), tl.arange(0, PADDED_ROWS), tl.arange(0, 128)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = p < places
    is_token = i % 8 < TOKENS
    by_head = n * 64 * 128 + i[:, None] * 128 + c[None, :]
    by_token = n * 64 * 64 + i[:, None] * 64 + i[None, :]
    by_row = n * 64 * PADDED_ROWS + i[:, None] * PADDED_ROWS + o[None, :]
    table = c[:, None] * places + p[None, :]
    place, last = n * places + p, ROWS + 8 * TOKENS
    stored = new_rows_NrL.dtype.element_ty

    keys = tl.load(keys_N64c + by_head)
    scores = tl.dot(keys, tl.load(queries_cL + table, here[None, :], 0.0), input_precision="ieee")
    scale = tl.full([BLOCK], 1.0, tl.float32)
    if ROWS > 0:
        scale = tl.load(scale_NL + place, here, 0.0)
        rows = tl.load(
            rows_NrL + (n * ROWS + o[:, None]) * places + p[None, :], (o < ROWS)[:, None] & here[None, :], 0.0
        )
        scores *= scale[None, :]
        rest = tl.load(queries_rest_cL + table, here[None, :], 0.0)
        scores = tl.dot(keys, rest, scores, input_precision="ieee")
        scores = tl.dot(tl.load(through_N64o + by_row), rows, scores, input_precision="ieee")
    heads = tl.reshape(tl.where(is_token[:, None], scores, float("-inf")), [8, 8, BLOCK])
    heads = tl.exp(heads - tl.max(heads, 1, keep_dims=True))
    weights = tl.reshape(heads / tl.sum(heads, 1, keep_dims=True), [64, BLOCK])

    dots = tl.load(dots_cL + table, here[None, :], 0.0)
    shared = tl.dot(tl.load(values_N64c + by_head), dots, input_precision="ieee") * (2 * scale[None, :])
    shared = tl.dot(tl.load(gram_N6464 + by_token), weights.to(stored), shared, input_precision="ieee")
    if ROWS > 0:
        shared = tl.dot(tl.load(cross_N64o + by_row), rows, shared, input_precision="ieee")
    shared += 2 * tl.load(constants_N65 + n * 65 + i)[:, None]
    energy = tl.sum(shared * weights, 0) + tl.load(constants_N65 + n * 65 + 64)
    energy += scale * scale * tl.load(energy_L + p, here, 0.0)
    energy += 2 * scale * tl.load(constant_dots_L + p, here, 0.0)
    if ROWS > 0:
        old_dots = tl.load(old_dots_cL + table, here[None, :], 0.0)
        old_values = tl.load(old_values_Noc + n * PADDED_ROWS * 128 + o[:, None] * 128 + c[None, :])
        shared = tl.dot(old_values, old_dots, input_precision="ieee")
        constant = tl.load(old_constant_dots_L + p, here, 0.0)
        shared += tl.where((o == ROWS - 1)[:, None], constant[None, :], 0.0)
        shared *= 2 * scale[None, :]
        square = n * PADDED_ROWS * PADDED_ROWS + o[:, None] * PADDED_ROWS + o[None, :]
        shared = tl.dot(tl.load(old_gram_Noo + square), rows, shared, input_precision="ieee")
        shared += 2 * tl.load(old_constants_No + n * PADDED_ROWS + o)[:, None]
        energy += tl.sum(shared * rows.to(tl.float32), 0)

    factor = tl.rsqrt(tl.maximum(energy, 0.0) / CHANNELS + eps)
    tl.store(new_scale_NL + place, scale * factor, here)
    into = new_rows_NrL + n * (last + 1) * places + p
    row = ROWS + i // 8 * TOKENS + i % 8
    made = (weights * factor[None, :]).to(stored)
    tl.store(into[None, :] + row[:, None] * places, made, is_token[:, None] & here[None, :])
    tl.store(into + last * places, factor.to(stored), here)
    if ROWS > 0:
        made = (rows.to(tl.float32) * factor[None, :]).to(stored)
        tl.store(into[None, :] + o[:, None] * places, made, (o < ROWS)[:, None] & here[None, :])


@triton.jit
def read(
    queries_N64c,
    through_N64o,
    scale_NL,
    rows_NrL,
    keys_cL,
    keys_rest_cL,
    values_cL,
    read_N64c,
    read_rows_N64o,
    places,
    ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A prompt's tokens read from all places: softmax and both sums in one pass. Program id: prompt.

    Args:
        queries_N64c: Of the tokens, by head, divided by the root of their length.
        through_N64o: Queries times the keys of the basis.
        scale_NL: s.
        rows_NrL: R.
        keys_cL: Of U.
        keys_rest_cL: Of what is not scaled.
        values_cL: Of U.
        read_N64c: Filled: the values of U, weighed; only a head's own channels have a meaning.
        read_rows_N64o: Filled: the rows, weighed.
        places: L.
        ROWS: Of the basis.
        PADDED_ROWS: A power of two, 16 at least.
        BLOCK: Places at a time.
    """
    n = tl.program_id(0).to(tl.int64)
    i, o, c = tl.arange(0, 64), tl.arange(0, PADDED_ROWS), tl.arange(0, 128)
    by_head = n * 64 * 128 + i[:, None] * 128 + c[None, :]
    by_row = n * 64 * PADDED_ROWS + i[:, None] * PADDED_ROWS + o[None, :]
    stored = rows_NrL.dtype.element_ty
    queries, through = tl.load(queries_N64c + by_head), tl.load(through_N64o + by_row)
    largest, total = tl.full([64], float("-inf"), tl.float32), tl.zeros([64], tl.float32)
    from_shared, from_rows = tl.zeros([64, 128], tl.float32), tl.zeros([64, PADDED_ROWS], tl.float32)
    for start in range(0, places, BLOCK):
        p = start + tl.arange(0, BLOCK)
        here = p < places
        table = c[:, None] * places + p[None, :]
        scale = tl.load(scale_NL + n * places + p, here, 0.0)
        rows = tl.load(
            rows_NrL + (n * ROWS + o[:, None]) * places + p[None, :], (o < ROWS)[:, None] & here[None, :], 0.0
        )
        keys = tl.load(keys_cL + table, here[None, :], 0.0)
        rest = tl.load(keys_rest_cL + table, here[None, :], 0.0)
        scores = tl.dot(queries, keys, input_precision="ieee") * scale[None, :]
        scores = tl.dot(queries, rest, scores, input_precision="ieee")
        scores = tl.dot(through, rows, scores, input_precision="ieee")
        scores = tl.where(here[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrunk = tl.exp(largest - larger)
        weights = tl.exp(scores - larger[:, None])
        total = total * shrunk + tl.sum(weights, 1)
        values = tl.load(values_cL + table, here[None, :], 0.0)
        scaled = (weights * scale[None, :]).to(stored)
        from_shared = tl.dot(scaled, tl.trans(values), from_shared * shrunk[:, None], input_precision="ieee")
        from_rows = tl.dot(weights.to(stored), tl.trans(rows), from_rows * shrunk[:, None], input_precision="ieee")
        largest = larger
    tl.store(read_N64c + by_head, from_shared / total[:, None])
    tl.store(read_rows_N64o + by_row, from_rows / total[:, None])
