"""Operations of the model that have, or will have, fused kernels."""
