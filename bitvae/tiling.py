def tiled_forward(net, x, rows): return net(x)
