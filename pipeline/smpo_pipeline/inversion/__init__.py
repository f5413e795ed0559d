"""From images to stored diffusion states: plain torch, no Ray (DESIGN 4.2, 4.3)."""
