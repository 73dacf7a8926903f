"""The three optimizers and their exchange in slow NumPy, step by step as DeepSpeed's code goes, for several workers.

Tensors are lists of float64 arrays; what a worker has is a list over workers. DeepSpeed's first call, which updates nothing
but advances its counter, is left out. `scales` is "tensor" (one call of the exchange a tensor) or "tree" (one call for all).
"""

import numpy as np


def sg(x):
    return np.where(x >= 0, 1.0, -1.0)


class Exchange:
    """The error-compensated mean of one set of tensors, padding masked."""

    def __init__(self, shapes, workers, scales="tensor"):
        self.workers, self.scales = workers, scales
        self.shapes = shapes
        self.chunk = [8 * -(-int(np.prod(s)) // (8 * workers)) for s in shapes]
        self.worker_error = [[np.zeros(int(np.prod(s))) for s in shapes] for _ in range(workers)]
        self.server_error = [[np.zeros(c) for c in self.chunk] for _ in range(workers)]

    def parts(self, flat, tensor):
        """The elements of a tensor that each server has; the last may be short or empty."""
        c = self.chunk[tensor]
        return [flat[i * c : (i + 1) * c] for i in range(self.workers)]

    def roots(self, values):
        """Root mean square of each array, or of all."""
        if self.scales == "tree":
            squares, sizes = sum((v**2).sum() for v in values), sum(v.size for v in values)
            return [np.sqrt(squares / max(sizes, 1))] * len(values)
        return [np.sqrt((v**2).sum() / max(v.size, 1)) for v in values]

    def __call__(self, tensors):
        """tensors[worker][tensor] -> the mean, a list of tensors."""
        w = self.workers
        if w == 1:
            return [x.copy() for x in tensors[0]]
        sent = []
        for r in range(w):
            corrected = [
                x.ravel() + e for x, e in zip(tensors[r], self.worker_error[r], strict=True)
            ]
            scales = self.roots(corrected)
            quantized = [s * sg(c) for s, c in zip(scales, corrected, strict=True)]
            self.worker_error[r] = [c - q for c, q in zip(corrected, quantized, strict=True)]
            sent.append(quantized)
        out = [[] for _ in self.shapes]
        for server in range(w):
            means = []
            for k in range(len(self.shapes)):
                mine = [self.parts(sent[r][k], k)[server] for r in range(w)]
                means.append(np.mean(mine, 0) + self.server_error[server][k][: mine[0].size])
            scales = self.roots(means)
            for k, (m, s) in enumerate(zip(means, scales, strict=True)):
                quantized = s * sg(m)
                self.server_error[server][k][: m.size] = m - quantized
                out[k].append(quantized)
        return [np.concatenate(o).reshape(s) for o, s in zip(out, self.shapes, strict=True)]


def mean(gradients):
    return [np.mean(g, 0) for g in zip(*gradients, strict=True)]


class OneBitAdam:
    def __init__(
        self, params, workers, *, lr, b1=0.9, b2=0.999, eps=1e-8, wd=0.0, freeze_step=3, mask=None,
        bias_correction=False,
    ):  # fmt: skip
        self.p = [x.copy() for x in params]
        self.m = [np.zeros_like(x) for x in params]
        self.v = [np.zeros_like(x) for x in params]
        self.o = (lr, b1, b2, eps, wd)
        self.freeze_step, self.mask, self.t = freeze_step, mask, 0
        self.bias_correction = bias_correction
        self.exchange = Exchange([x.shape for x in params], workers)

    def step(self, gradients):
        lr, b1, b2, eps, wd = self.o
        self.t += 1
        if self.t <= self.freeze_step:
            g = mean(gradients)
            self.m = [b1 * m + (1 - b1) * x for m, x in zip(self.m, g, strict=True)]
            self.v = [b2 * v + (1 - b2) * x**2 for v, x in zip(self.v, g, strict=True)]
        else:
            local = [
                [b1 * m + (1 - b1) * x for m, x in zip(self.m, g, strict=True)] for g in gradients
            ]
            self.m = self.exchange(local)
            if self.mask is not None:
                self.m = [m * k for m, k in zip(self.m, self.mask, strict=True)]
        of_m, of_v = 1.0, 1.0
        if self.bias_correction:
            of_m, of_v = 1 - b1**self.t, 1 - b2 ** min(self.t, self.freeze_step)
        self.p = [
            p - lr * (m / of_m / (np.sqrt(v / of_v) + eps) + wd * p)
            for p, m, v in zip(self.p, self.m, self.v, strict=True)
        ]


class ZeroOneAdam:
    """With local parameters written out: self.local[worker] is where a worker stands."""

    def __init__(self, params, workers, *, lr, b1=0.9, b2=0.999, eps=1e-8, var_freeze_step=4, var_update_scaler=1,
                 local_step_scaler=1, local_step_clipper=2, wd=0.0, mask=None, var_decay="update",
                 bias_correction=False):  # fmt: skip
        self.bias_correction, self.left_of_v = bias_correction, 1.0
        self.workers, self.wd, self.var_decay = workers, wd, var_decay
        self.mask = [np.ones_like(x) for x in params] if mask is None else mask
        self.local = [[x.copy() for x in params] for _ in range(workers)]
        self.m = [[np.zeros_like(x) for x in params] for _ in range(workers)]
        self.u = [[np.zeros_like(x) for x in params] for _ in range(workers)]
        self.v = [np.zeros_like(x) for x in params]
        self.lr, self.b1, self.b2, self.eps = lr, b1, b2, eps
        self.var_freeze_step, self.kappa = var_freeze_step, var_update_scaler
        self.scaler, self.clipper = local_step_scaler, local_step_clipper
        self.t, self.var_interval, self.var_counter, self.last_var_update = 0, 1, 0, 0
        self.local_interval, self.local_counter, self.lrs = 1, 0, 0.0
        self.exchange = Exchange([x.shape for x in params], workers)
        self.rounds = []

    def denominators(self):
        return [np.sqrt(v) + self.eps for v in self.v]

    def masked(self, tree):
        return [x * k for x, k in zip(tree, self.mask, strict=True)]

    def step(self, gradients):
        self.t += 1
        lr = self.lr(self.t - 1)
        b1, b2 = self.b1, self.b2
        if self.t <= self.var_freeze_step:
            if self.t % self.var_interval == 0:
                g = mean(gradients)
                d = b2 if self.var_decay == "update" else b2 ** (self.t - self.last_var_update)
                self.last_var_update = self.t
                self.v = [d * v + (1 - d) * x**2 for v, x in zip(self.v, g, strict=True)]
                self.left_of_v *= d
                self.var_counter += 1
                self.rounds.append(0)
                if self.var_counter == self.kappa:
                    self.var_counter, self.var_interval = 0, self.var_interval * 2
            else:
                g = self.masked(self.exchange(gradients))
                self.rounds.append(1)
            of_m, of_v = 1.0, 1.0
            if self.bias_correction:
                of_m, of_v = 1 - b1**self.t, 1 - self.left_of_v
            for r in range(self.workers):
                self.m[r] = [b1 * m + (1 - b1) * x for m, x in zip(self.m[r], g, strict=True)]
                self.local[r] = [
                    p - lr * m / of_m / (np.sqrt(v / of_v) + self.eps) - lr * self.wd * p
                    for p, m, v in zip(self.local[r], self.m[r], self.v, strict=True)
                ]
            if self.t == self.var_freeze_step:
                self.m = [[m / of_m for m in own] for own in self.m]
                self.v = [v / of_v for v in self.v]
                self.exchange = Exchange([x.shape for x in self.v], self.workers)
            return
        self.lrs += lr
        for r, g in enumerate(gradients):
            after = [b1 * m + (1 - b1) * x for m, x in zip(self.m[r], g, strict=True)]
            self.m[r] = self.masked(after)
            moves = [lr * m / d for m, d in zip(self.m[r], self.denominators(), strict=True)]
            self.local[r] = [p - x for p, x in zip(self.local[r], moves, strict=True)]
            self.u[r] = [u - x for u, x in zip(self.u[r], moves, strict=True)]
        if self.t % self.local_interval == 0:
            scaled = [
                [u * d for u, d in zip(us, self.denominators(), strict=True)] for us in self.u
            ]
            agreed = self.masked(self.exchange(scaled))
            for r in range(self.workers):
                back = [p - u for p, u in zip(self.local[r], self.u[r], strict=True)]
                self.m[r] = [-x / self.lrs for x in agreed]
                self.local[r] = [
                    p + x / d - self.lrs * self.wd * p
                    for p, x, d in zip(back, agreed, self.denominators(), strict=True)
                ]
                self.u[r] = [np.zeros_like(x) for x in agreed]
            self.lrs = 0.0
            self.rounds.append(3)
        else:
            self.rounds.append(2)
        self.local_counter += 1
        if self.local_counter == self.scaler:
            self.local_counter, self.local_interval = 0, min(self.clipper, 2 * self.local_interval)


class OneBitLamb:
    def __init__(self, params, workers, *, lr, b1=0.9, b2=0.999, eps=1e-8, wd=0.0, freeze_step=3, max_coeff=10.0,
                 min_coeff=0.01, coeff_beta=0.9, factor_max=4.0, factor_min=0.5, factor_threshold=0.1):  # fmt: skip
        self.p = [x.copy() for x in params]
        self.m, self.v, self.fresh = ([np.zeros_like(x) for x in params] for _ in range(3))
        self.coeff, self.factor, self.a = [0.0] * len(params), [1.0] * len(params), None
        self.o = (lr, b1, b2, eps, wd)
        self.bounds = (min_coeff, max_coeff, coeff_beta, factor_min, factor_max, factor_threshold)
        self.freeze_step, self.t = freeze_step, 0
        self.exchange = Exchange([x.shape for x in params], workers, "tree")

    def step(self, gradients):
        lr, b1, b2, eps, wd = self.o
        low, high, beta, factor_min, factor_max, threshold = self.bounds
        self.t += 1
        if self.t <= self.freeze_step:
            for k, g in enumerate(mean(gradients)):
                self.m[k] = b1 * self.m[k] + (1 - b1) * g
                self.v[k] = b2 * self.v[k] + (1 - b2) * g**2
                u = self.m[k] / (np.sqrt(self.v[k]) + eps) + wd * self.p[k]
                norms = np.linalg.norm(self.p[k]), np.linalg.norm(u)
                c = np.clip(norms[0] / norms[1], low, high) if norms[0] and norms[1] else 1.0
                if c != 1.0:
                    self.coeff[k] = beta * self.coeff[k] + (1 - beta) * c
                self.p[k] = self.p[k] - lr * c * u
            self.fresh = [v.copy() for v in self.v]
            return
        if self.a is None:
            z = [np.linalg.norm(m) / np.sqrt(m.size) for m in self.m]
            self.a = [np.mean(z) / x for x in z]
        last = self.m
        local = [
            [(b1 * m + (1 - b1) * x) * a for m, x, a in zip(self.m, g, self.a, strict=True)]
            for g in gradients
        ]
        self.m = [m / a for m, a in zip(self.exchange(local), self.a, strict=True)]
        for k in range(len(self.p)):
            g = (self.m[k] - b1 * last[k]) / (1 - b1)
            self.fresh[k] = b2 * self.fresh[k] + (1 - b2) * g**2
            d = np.sqrt(self.v[k]) + eps
            u0 = self.m[k] / d
            u = u0 + wd * self.p[k]
            r = np.max(d / (np.sqrt(self.fresh[k]) + eps))
            if wd > 0:
                rho = min(1.0, np.linalg.norm(u0) / np.linalg.norm(u))
                r = r * rho + (1 - rho)
            r = np.clip(r, factor_min, factor_max)
            r = np.clip(r, self.factor[k] * (1 - threshold), self.factor[k] * (1 + threshold))
            self.factor[k] = r
            self.p[k] = self.p[k] - lr * self.coeff[k] * r * u
