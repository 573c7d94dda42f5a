"""The nets: torchvision's family (`resnet`), the 2015 paper's nets (`paper`), timm's blocks, and their FLOPs."""
