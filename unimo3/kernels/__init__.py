"""Operations of the model that have fused kernels."""
