"""What the networks are: torchvision's family (`resnet`), the 2015 paper's (`paper`), their cost (`flops`)."""
