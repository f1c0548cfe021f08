"""Bodies of the operators of domain `vlmq`, in ONNX's textual syntax; stock onnxruntime inlines them at loading.

An input's codes are uint8 around 128 on symmetric grids, 0 .. top on others, as kernels/grid.py rounds them: a scale is
divided by, not multiplied by its inverse, so that codes are the same. Products on integers are exact in int32 up to
2**31 / 2**15 = 65536 columns. MatMulIntegerToFloat takes one scale for all rows of its input, so tokens' come after it.
"""

OPSET = 20
_SMALLEST = "1.1754943508222875e-38"  # float32's smallest normal number: the scale of a token of zeros
_HEADER = f'<domain: "vlmq", opset_import: ["" : {OPSET}, "com.microsoft" : 1]>'

# Codes of tokens, symmetric: in one pass, by QuantizeLinear, which divides by 1, rounds, adds 128 and saturates.
_TOKEN_CODES = f"""
    last = Constant <value_ints: ints = [-1]> ()
    greatest = ReduceMax <keepdims: int = 1> (x, last)
    least = ReduceMin <keepdims: int = 1> (x, last)
    depth = Neg (least)
    largest = Max (greatest, depth)
    top = Constant <value_float: float = @top> ()
    step = Div (largest, top)
    smallest = Constant <value_float: float = {_SMALLEST}> ()
    scale = Max (step, smallest)
    units = Div (x, scale)
    one = Constant <value: tensor = float one {{1.0}}> ()
    middle = Constant <value: tensor = uint8 middle {{128}}> ()
    codes = QuantizeLinear (units, one, middle)"""

# Codes of tokens from 0 to top, as float32, and the zero of each token.
_UNEVEN_CODES = f"""
    last = Constant <value_ints: ints = [-1]> ()
    nought = Constant <value_float: float = 0.0> ()
    least = ReduceMin <keepdims: int = 1> (grouped, last)
    low = Min (least, nought)
    greatest = ReduceMax <keepdims: int = 1> (grouped, last)
    high = Max (greatest, nought)
    top = Constant <value_float: float = @top> ()
    range = Sub (high, low)
    step = Div (range, top)
    smallest = Constant <value_float: float = {_SMALLEST}> ()
    scale = Max (step, smallest)
    below = Div (low, scale)
    depth = Neg (below)
    whole_depth = Round (depth)
    zero = Clip (whole_depth, nought, top)
    units = Div (grouped, scale)
    whole = Round (units)
    shifted = Add (whole, zero)
    codes = Clip (shifted, nought, top)"""

_GROUPED = """
    shape = Shape (x)
    lead = Shape <end: int = -1> (x)
    groups = Constant <value_ints: ints = @groups> ()
    apart = Concat <axis: int = 0> (lead, groups)
    grouped = Reshape (x, apart)"""

BODIES = {
    # low four bits and the bits above, times the same scales
    "SplitMatMul": """
<K, N, block_size, accuracy_level, high_bits>
(x, low, high, scales, low_zeros, high_zeros) => (y) {
    lower = com.microsoft.MatMulNBits <K: int = @K, N: int = @N, bits: int = 4, block_size: int = @block_size,
        accuracy_level: int = @accuracy_level> (x, low, scales, low_zeros)
    upper = com.microsoft.MatMulNBits <K: int = @K, N: int = @N, bits: int = @high_bits, block_size: int = @block_size,
        accuracy_level: int = @accuracy_level> (x, high, scales, high_zeros)
    sixteen = Constant <value_float: float = 16.0> ()
    raised = Mul (upper, sixteen)
    y = Add (lower, raised)
}""",
    # a scale for each token, symmetric
    "TokenMatMul": f"""
<top>
(x, weight, scales, zeros) => (y) {{{_TOKEN_CODES}
    sums = com.microsoft.MatMulIntegerToFloat (codes, weight, one, scales, middle, zeros)
    y = Mul (sums, scale)
}}""",
    # a scale and a zero for each token; columns (out,) int32 are the sums of the weight's levels over its columns
    "UnevenTokenMatMul": f"""
<top>
(x, columns, weight, scales, zeros) => (y) {{
    grouped = Identity (x){_UNEVEN_CODES}
    bytes = Cast <to: int = 2> (codes)
    none = Constant <value: tensor = uint8 none {{0}}> ()
    sums = MatMulInteger (bytes, weight, none, zeros)
    zero_count = Cast <to: int = 6> (zero)
    offsets = Mul (zero_count, columns)
    levels = Sub (sums, offsets)
    counts = Cast <to: int = 1> (levels)
    rows = Mul (counts, scale)
    y = Mul (rows, scales)
}}""",
    # one scale and zero for all tokens, known beforehand
    "TensorMatMul": """
<least, most>
(x, scale, zero, weight, scales, zeros) => (y) {
    wide = QuantizeLinear (x, scale, zero)
    least = Constant <value_float: float = @least> ()
    first = Cast <to: int = 2> (least)
    most = Constant <value_float: float = @most> ()
    final = Cast <to: int = 2> (most)
    codes = Clip (wide, first, final)
    y = com.microsoft.MatMulIntegerToFloat (codes, weight, scale, scales, zero, zeros)
}""",
    # simulated: the values that the codes stand for
    "RoundTensor": """
<least, most>
(x, scale, zero) => (y) {
    middle = Cast <to: int = 1> (zero)
    units = Div (x, scale)
    whole = Round (units)
    shifted = Add (whole, middle)
    least = Constant <value_float: float = @least> ()
    most = Constant <value_float: float = @most> ()
    codes = Clip (shifted, least, most)
    levels = Sub (codes, middle)
    y = Mul (levels, scale)
}""",
    "RoundGroups": f"""
<groups, top>
(x) => (y) {{{_GROUPED}
    last = Constant <value_ints: ints = [-1]> ()
    sizes = Abs (grouped)
    largest = ReduceMax <keepdims: int = 1> (sizes, last)
    top = Constant <value_float: float = @top> ()
    step = Div (largest, top)
    smallest = Constant <value_float: float = {_SMALLEST}> ()
    scale = Max (step, smallest)
    units = Div (grouped, scale)
    whole = Round (units)
    rounded = Mul (whole, scale)
    y = Reshape (rounded, shape)
}}""",
    "RoundUnevenGroups": f"""
<groups, top>
(x) => (y) {{{_GROUPED}{_UNEVEN_CODES}
    levels = Sub (codes, zero)
    rounded = Mul (levels, scale)
    y = Reshape (rounded, shape)
}}""",
}


def text(name: str) -> str:
    """The whole definition of one function, as onnx.parser reads it."""
    attributes, _, rest = BODIES[name].strip().partition("\n")
    return f"{_HEADER}\n{name} {attributes}\n{rest}"
