"""Training: recipes as data, images, the loop, checkpoints. Nothing here is loaded by `import fastres`."""
