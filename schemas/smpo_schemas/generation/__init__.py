"""Tables and records about generated images: candidates, the latents kept with them, selected pairs."""
