"""What is quantized, how, and where the codes live once they are frozen."""
