"""What a quantized number is: formats, scale rules, quantize and dequantize, kernels. Needs torch only."""
