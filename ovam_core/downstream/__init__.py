"""Systems of others that carry trained modules of their own, as methods: Grounded Diffusion and DatasetDM; and Segment
Anything, which refines the masks of any method (sam.py).

Their weights are their authors' and are brought by who uses them:

    method = GroundedDiffusion("grounding_module.pth")
    picture = ovam.generate("a photo of a lion on a mountain top", num_inference_steps=50, features=True)
    found = ovam.segment(picture, ["lion", token], method=method)
"""
