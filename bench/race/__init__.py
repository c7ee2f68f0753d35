"""Time to accuracy: `fastvitc-train` against timm's parts, whole programs from a cold start."""
