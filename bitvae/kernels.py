import torch
def chunked_forward(net, x, activation):
    each = max(1, (1 << 23) // activation)
    if x.device.type != "cpu" or len(x) <= each: return net(x)
    return torch.cat([net(p) for p in x.split(each)])
def optimize(model): return model
def retain_malloc_heap(): return True
def checkpoint_activations(model): pass
