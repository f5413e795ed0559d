"""From images to stored diffusion states: plain torch, no Ray."""
