"""Training steps that transport nothing, written in many ways: what an audit must not accuse."""

import copy
import math

import torch
import torch.nn.functional as F
from leaks import FlatMasters, Masters, OwnMirror, Task, Whole, with_norm
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

# Updates of W and B together, where each half depends on its own


class Stacked(torch.optim.Optimizer):
    """SGD with momentum on all parameters of one shape at once."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for shape in {p.shape for p in parameters}:
            alike = [p for p in parameters if p.shape == shape]
            values, gradients = torch.stack(alike), torch.stack([p.grad for p in alike])
            values.mul_(0.99).sub_(gradients, alpha=0.05)
            for parameter, value in zip(alike, values, strict=True):
                parameter.copy_(value)


class Flattened(Stacked):
    """SGD on one vector of all parameters."""

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        vector = nn.utils.parameters_to_vector(parameters)
        gradient = nn.utils.parameters_to_vector([p.grad for p in parameters])
        nn.utils.vector_to_parameters(vector * 0.99 - 0.05 * gradient, parameters)


class InOneMemory(Stacked):
    """SGD on one vector that all parameters are views of."""

    def __init__(self, parameters):
        super().__init__(parameters)
        parameters = self.param_groups[0]["params"]
        self.vector = nn.utils.parameters_to_vector(parameters).detach().clone()
        start = 0
        for parameter in parameters:
            parameter.data = self.vector[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    @torch.no_grad()
    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.vector.mul_(0.99).sub_(nn.utils.parameters_to_vector(gradients), alpha=0.05)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal by Newton and Schulz's iteration."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.02})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            momentum.mul_(0.95).add_(parameter.grad)
            update = momentum
            if update.dim() == 2:
                update = update / (update.norm() + 1e-7)
                for _ in range(5):
                    update = 1.5 * update - 0.5 * update @ update.T @ update
            parameter.mul_(1 - 1e-3).sub_(update, alpha=0.02)


class SharpnessAware(torch.optim.SGD):
    """Two passes: the second where W has climbed along its gradient."""

    @torch.no_grad()
    def climb(self):
        parameters = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad, alpha=0.05 / (float(norm) + 1e-12))
        self.zero_grad()

    @torch.no_grad()
    def descend(self):
        for state, p in [
            (self.state[p], p) for g in self.param_groups for p in g["params"] if p in self.state
        ]:
            if "old" in state:
                p.data = state.pop("old")
        self.step()


class SharpnessAwareTask(Task):
    def __init__(self, rule):
        super().__init__(rule, optimizer=lambda p: SharpnessAware(p, lr=0.1, weight_decay=1e-2))

    def step(self):
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.climb()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.descend()
        self.path.step()


class ClosureTask(Task):
    def __init__(self, rule, search=None):
        super().__init__(
            rule, optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4, line_search_fn=search)
        )

    def step(self):
        def closure():
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(self.x), self.y)
            loss.backward()
            return loss

        self.optimizer.step(closure)
        self.path.step()


# What is logged and asserted of W


def log_much(task):
    task.log = []
    for _, w, _ in task.path.pairs():
        assert w.isfinite().all()
        task.log.append((torch.linalg.svdvals(w).tolist(), torch.histc(w, 5).tolist(), int(1000 * w.sum())))
        task.log.append((w.argmax().item(), w.detach().numpy().mean(), f"{w.norm():.3f}"))


def log_logarithm(task):
    """Zeros have none: the pass that tries them ends there."""
    task.log = [math.log(w.norm().item()) for _, w, _ in task.path.pairs()]


def log_angles(task):
    task.log = task.path.matrix_angles(), task.path.gains()


def measure_deltas(task):
    with torch.enable_grad():
        task.log = task.path.delta_angles(lambda: F.cross_entropy(task.model(task.x), task.y))


def stop_if_large(task):
    for _, w, _ in task.path.pairs():
        if w.abs().max() > 1e4:
            raise RuntimeError("diverged")


# Python's own state


class Counting(Task):
    """The learning rate falls with a counter, and each step takes another minibatch."""

    def __init__(self, rule):
        super().__init__(rule)
        self.count = 0
        self.batches = iter(torch.randn(100, 16, 6))

    def step(self):
        self.count += 1
        self.optimizer.param_groups[0]["lr"] = 0.1 / self.count
        self.x = next(self.batches)
        super().step()


class Loading(Task):
    def __init__(self, rule):
        super().__init__(rule)
        data = TensorDataset(torch.randn(64, 6), torch.randint(3, (64,)))
        self.batches = iter(DataLoader(data, batch_size=16, shuffle=True))

    def step(self):
        self.x, self.y = next(self.batches)
        super().step()


def write_log(task):
    with open(task.place, "a") as file:
        file.write(f"{task.model[0].weight.norm():.4f}\n")


# Averages, scalers, checkpoints


def with_average(rule):
    task = Task(rule, after_update=lambda task: task.average.update_parameters(task.model))
    task.average = torch.optim.swa_utils.AveragedModel(task.model)
    return task


class Teacher(Whole):
    """Learns from an average of itself as well: both are run forward."""

    def __init__(self, rule):
        super().__init__(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), rule)
        self.teacher = copy.deepcopy(self.model)

    def step(self):
        self.optimizer.zero_grad()
        with torch.no_grad():
            target = self.teacher(self.x).softmax(1)
        F.cross_entropy(self.model(self.x), target).backward()
        self.optimizer.step()
        self.path.step()
        with torch.no_grad():
            for mean, own in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(own, 0.1)


def with_lookahead(rule):
    def after(task):
        task.count += 1
        if task.count % 2 == 0:
            for slow, parameter in zip(task.slow, task.model.parameters(), strict=True):
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)

    task = Task(rule, after_update=after)
    task.count, task.slow = 0, [p.detach().clone() for p in task.model.parameters()]
    return task


class Scaled(Task):
    def step(self):
        self.scaler = getattr(self, "scaler", None) or torch.amp.GradScaler("cpu", init_scale=256.0)
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(self.model(self.x), self.y)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.path.clip_grad_norm_(1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.path.step()


class Checkpointed(Task):
    reentrant = False

    def step(self):
        self.optimizer.zero_grad()
        for x, y in zip(self.x.chunk(2), self.y.chunk(2), strict=True):
            x = x.clone().requires_grad_()
            hidden = checkpoint(self.model[:4], x, use_reentrant=self.reentrant)
            F.cross_entropy(self.model[4](hidden), y).backward()
        self.optimizer.step()
        self.path.step()


class CheckpointedReentrantly(Checkpointed):
    reentrant = True


# Readings: the layer's own map of a signal that was made without W


def read_by_layer(signal):
    def after(task):
        for layer in task.path.layers.values():
            bias = 0.0 if layer.bias is None else layer.bias
            layer.feedback.lerp_((layer(signal(layer)) - bias).T @ signal(layer) / len(signal(layer)), 0.5)

    return after


def one_hot(layer):
    return torch.eye(layer.in_features)


def noise(layer):
    return torch.randn(32, layer.in_features, generator=torch.Generator().manual_seed(5))


def in_autocast(product, *operands):
    with torch.autocast("cpu", torch.bfloat16):
        return product(*operands).float()


class ByParts(ClosureTask):
    """The layers are called one by one, at every weight that a line search tries."""

    def step(self):
        def closure():
            self.optimizer.zero_grad()
            hidden = self.model[1](self.model[0](self.x))
            loss = F.cross_entropy(self.model[4](self.model[3](self.model[2](hidden))), self.y)
            loss.backward()
            return loss

        self.optimizer.step(closure)
        self.path.step()


def with_mirror_and_lookahead(rule):
    """W is read after the update, and changed again before the step ends."""
    task = with_lookahead(OwnMirror(lambda weight, noise: noise @ weight.weight.T))
    task.count = 1
    return task


class ScheduleFree(torch.optim.Optimizer):
    """SGD whose gradients are taken between its iterate and their average."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                iterate = state.setdefault("iterate", parameter.clone())
                parameter.lerp_(iterate, 1 / state["count"]).sub_(parameter.grad, alpha=0.01)
                iterate.sub_(parameter.grad, alpha=0.05)


class LayerwiseRates(Stacked):
    """The rate of each parameter is its own norm over its gradient's."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and parameter.dim() == 1:
                parameter.sub_(parameter.grad, alpha=0.05)
            elif parameter.grad is not None:
                parameter.sub_(parameter.grad * (0.01 * parameter.norm() / (parameter.grad.norm() + 1e-8)))


def with_inputs_that_learn(rule):
    """Inputs get gradients, as adversarial ones and prompts do."""
    task = Whole(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), rule)
    task.x.requires_grad_()
    plain = task.step

    def step():
        plain()
        with torch.no_grad():
            task.x.sub_(task.x.grad.sign(), alpha=0.01)
            task.x.grad = None

    task.step = step
    return task


def with_average_in_its_place(task):
    """The average of W is tried out on the data, and W comes back."""
    task.means = getattr(task, "means", None) or [p.clone() for p in task.model.parameters()]
    own = [p.clone() for p in task.model.parameters()]
    for mean, parameter in zip(task.means, task.model.parameters(), strict=True):
        mean.lerp_(parameter, 0.1)
        parameter.copy_(mean)
    task.log = F.cross_entropy(task.model(task.x), task.y).item()
    for parameter, value in zip(task.model.parameters(), own, strict=True):
        parameter.copy_(value)


# What B does by itself


def tend_feedback(task):
    for _, _, b in task.path.pairs():
        b.mul_(0.999).add_(torch.randn(b.shape), alpha=1e-3).clamp_(-1, 1)
        b.mul_(2.0 / b.norm())
        b[b.abs() < 1e-2] = 0.0


def penalty(task, loss):
    """A penalty on W gives W a gradient, and B none."""
    return loss + 0.01 * sum(w.square().sum() for _, w, _ in task.path.pairs())


def project_weights(task):
    for _, w, _ in task.path.pairs():
        w.div_(w.norm(dim=1, keepdim=True).clamp_min(1.0))
        w.mul_(w.abs() > 1e-3)


class Noisy(nn.Linear):
    """A layer whose synapses are noisy."""

    def forward(self, x):
        return F.linear(x, F.dropout(self.weight, 0.2) + 0.01 * torch.randn_like(self.weight), self.bias)


class Signs(torch.autograd.Function):
    """Signs, whose gradient goes straight through."""

    @staticmethod
    def forward(ctx, weight):
        return weight.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Binary(nn.Linear):
    """A layer that multiplies by its weight's signs."""

    def forward(self, x):
        return F.linear(x, Signs.apply(self.weight), self.bias)


class WithTeacher(Whole):
    """An autoencoder that began with its second weight as the first one's transpose, and its average."""

    def __init__(self, rule):
        super().__init__(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), rule)
        with torch.no_grad():
            self.model[2].weight.copy_(self.model[0].weight.T)
        self.teacher = copy.deepcopy(self.model)

    def step(self):
        with torch.no_grad():
            for mean, own in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(own, 0.1)
            target = self.teacher(self.x) + self.x
        self.optimizer.zero_grad()
        F.mse_loss(self.model(self.x), target).backward()
        self.optimizer.step()
        self.path.step()


def check_size(task):
    for _, w, _ in task.path.pairs():
        assert 0.1 < w.norm() < 10


def look_if_large(task):
    """What is asked of W decides about one more forward pass, for logging."""
    if any(w.norm() > 20 for _, w, _ in task.path.pairs()):
        task.log = task.model(task.x).std().item(), task.model(torch.ones(2, 6)).mean().item()


class InputFirst(nn.Module):
    """A dense layer that lays its weight out as ``[in, out]``."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        return x @ self.kernel


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(16, 6))
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(F.gelu(self.first(x + self.positions)))


# Tensors of other layouts, and what ``torch.func`` wraps


class Functional(Task):
    """Gradients are taken by ``torch.func``, of all samples together."""

    def gradients(self):
        def loss(parameters):
            return F.cross_entropy(functional_call(self.model, parameters, (self.x,)), self.y)

        return grad(loss)(dict(self.model.named_parameters()))

    def step(self):
        gradients = self.gradients()
        for name, parameter in self.model.named_parameters():
            parameter.grad = gradients[name].detach()
        self.optimizer.step()
        self.path.step()


class PerSample(Functional):
    """Each sample has a gradient of its own, as for differential privacy."""

    def gradients(self):
        def loss(parameters, x, y):
            return F.cross_entropy(functional_call(self.model, parameters, (x[None],)), y[None])

        gradients = vmap(grad(loss), (None, 0, 0))(dict(self.model.named_parameters()), self.x, self.y)
        return {name: values.clamp(-1, 1).mean(0) for name, values in gradients.items()}


def log_gradients(task):
    with torch.enable_grad():
        task.log = [g.norm().item() for g in Functional.gradients(task).values()]


class SparseTable(Whole):
    """An embedding whose gradients are sparse, with an optimizer of its own."""

    def __init__(self, rule):
        layers = nn.Embedding(9, 6, sparse=True), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)
        super().__init__(lambda: nn.Sequential(*layers), rule)
        self.x = torch.randint(9, (16,))
        self.table = torch.optim.SparseAdam([self.optimizer.param_groups[0]["params"].pop(0)])

    def step(self):
        self.table.zero_grad()
        super().step()
        self.table.step()


class Graph(nn.Module):
    """Each node adds up what its neighbours have."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, graph):
        x, neighbours = graph
        hidden = torch.sparse.mm(neighbours, self.first(x)).relu()
        return torch.sparse.mm(neighbours, self.last(hidden))


def with_graph(rule, layout):
    task = Whole(Graph, rule)
    task.x = task.x, (torch.rand(16, 16) < 0.3).float().to_sparse(layout=layout)
    return task


def log_layouts(task):
    task.log = []
    for _, w, _ in task.path.pairs():
        task.log.append((w.to_sparse()._nnz(), w.to_sparse_csr().values().norm().item()))
        task.log.append(w.to_mkldnn().to_dense().norm().item())
        task.log += [nested_norm([w[0], w[1, :2]], layout) for layout in (torch.strided, torch.jagged)]


def nested_norm(rows, layout):
    return torch.nested.nested_tensor(rows, layout=layout).to_padded_tensor(0.0).norm().item()


CLEAN = {
    "stacked": lambda rule: Task(rule, optimizer=Stacked),
    "flattened": lambda rule: Task(rule, optimizer=Flattened),
    "in-one-memory": lambda rule: Task(rule, optimizer=InOneMemory),
    "muon": lambda rule: Task(rule, optimizer=Muon),
    "adafactor": lambda rule: Task(rule, optimizer=lambda p: torch.optim.Adafactor(p, lr=1e-2)),
    "sam": SharpnessAwareTask,
    "lbfgs": ClosureTask,
    "lbfgs-wolfe": lambda rule: ClosureTask(rule, "strong_wolfe"),
    "lbfgs-by-parts": ByParts,
    "schedule-free": lambda rule: Task(rule, optimizer=ScheduleFree),
    "layerwise-rates": lambda rule: Task(rule, optimizer=LayerwiseRates),
    "masters": lambda rule: Masters(leaks=False),
    "masters-in-one-vector": lambda rule: FlatMasters(leaks=False),
    "logs-much": lambda rule: Task(rule, before=log_much, after_update=log_much),
    "logs-logarithm": lambda rule: Task(rule, before=log_logarithm),
    "logs-angles": lambda rule: Task(rule, after_update=log_angles),
    "measures-deltas": lambda rule: Task(rule, after_update=measure_deltas),
    "stops-if-large": lambda rule: Task(rule, before=stop_if_large),
    "counter-and-minibatches": Counting,
    "loader": Loading,
    "average": with_average,
    "teacher": Teacher,
    "lookahead": with_lookahead,
    "mirror-and-lookahead": with_mirror_and_lookahead,
    "average-in-its-place": lambda rule: Task(rule, after_update=with_average_in_its_place),
    "inputs-that-learn": with_inputs_that_learn,
    "scaler-and-autocast": Scaled,
    "checkpointed": Checkpointed,
    "checkpointed-reentrantly": CheckpointedReentrantly,
    "read-by-one-hot": lambda rule: Task(rule, after_update=read_by_layer(one_hot)),
    "read-by-noise": lambda rule: Task(rule, after_update=read_by_layer(noise)),
    "own-mirror": lambda rule: Task(OwnMirror(lambda weight, noise: noise @ weight.weight.T)),
    "own-mirror-by-layer": lambda rule: Task(OwnMirror(lambda weight, noise: weight.layer(noise))),
    "own-mirror-by-layer-in-autocast": lambda rule: Task(
        OwnMirror(lambda weight, noise: in_autocast(weight.layer, noise))
    ),
    "own-mirror-in-autocast": lambda rule: Task(
        OwnMirror(lambda weight, noise: in_autocast(torch.matmul, noise, weight.weight.T))
    ),
    "own-mirror-by-einsum": lambda rule: Task(
        OwnMirror(lambda weight, noise: torch.einsum("bi,oi->bo", noise, weight.weight))
    ),
    "own-mirror-by-einsum-from-the-left": lambda rule: Task(
        OwnMirror(lambda weight, noise: torch.einsum("oi,bi->ob", weight.weight, noise).T)
    ),
    "feedback-tended": lambda rule: Task(rule, after_update=tend_feedback),
    "penalty": lambda rule: Task(rule, on_loss=penalty),
    "weights-projected": lambda rule: Task(rule, after_update=project_weights),
    "batchnorm": lambda rule: Task(rule, model=with_norm(nn.BatchNorm1d(8))),
    "layernorm": lambda rule: Task(rule, model=with_norm(nn.LayerNorm(8))),
    "rmsnorm": lambda rule: Task(rule, model=with_norm(nn.RMSNorm(8))),
    "prelu": lambda rule: Task(rule, model=with_norm(nn.PReLU(8))),
    "dropout": lambda rule: Task(rule, model=with_norm(nn.Dropout(0.3))),
    "noisy-synapses": lambda rule: Task(
        rule, model=nn.Sequential(Noisy(6, 8), nn.ReLU(), Noisy(8, 8), nn.ReLU(), nn.Linear(8, 3))
    ),
    "straight-through": lambda rule: Task(
        rule, model=nn.Sequential(Binary(6, 8), nn.ReLU(), Binary(8, 8), nn.ReLU(), nn.Linear(8, 3))
    ),
    "autoencoder-with-teacher": WithTeacher,
    "size-checked": lambda rule: Task(rule, before=check_size),
    "looked-at-before": lambda rule: Task(rule, before=look_if_large),
    "looked-at-after": lambda rule: Task(rule, after_update=look_if_large),
    "weights-input-first": lambda rule: Task(rule, model=with_norm(InputFirst())),
    "layers-input-first": lambda rule: Task(
        rule, model=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), InputFirst(), nn.ReLU(), nn.Linear(8, 3))
    ),
    "positions": lambda rule: Whole(Positions, rule),
    "torch-func": Functional,
    "torch-func-per-sample": PerSample,
    "torch-func-logged": lambda rule: Task(rule, after_update=log_gradients),
    "sparse-embedding": SparseTable,
    "sparse-graph": lambda rule: with_graph(rule, torch.sparse_coo),
    "sparse-graph-compressed": lambda rule: with_graph(rule, torch.sparse_csr),
    "logs-layouts": lambda rule: Task(rule, before=log_layouts),
}
