"""A calculation in three tool calls: the result of one is an argument of the next."""

from spearrl import ConfigError, Done, Task, ToolEnvironment, call, tool


class Calculator(ToolEnvironment):
    max_turns = 5

    def tasks(self, split):
        if split not in ("train", "val"):
            raise ConfigError(f"split {split!r} is not one of train, val", hint="use train or val")
        return [Task(f"{split}-{i}", split) for i in range(300)]

    def begin(self, task, draw):
        self.draw, self.product, self.sum = draw, None, None
        self.a, self.b, self.c = (draw.randint(2, 9) for _ in range(3))
        return f"What is {self.a} * {self.b} + {self.c} ?"

    @tool
    def multiply(self, a: int, b: int) -> str:
        """Multiply two numbers."""
        self.product = a * b
        return f"= {self.product}"

    @tool
    def add(self, a: int, b: int) -> str:
        """Add two numbers."""
        self.sum = a + b
        return f"= {self.sum}"

    @tool
    def answer(self, value: int) -> Done:
        """Give the result; this ends the task."""
        return Done(reward=10.0 * (value == self.a * self.b + self.c))

    def expert(self):
        if self.draw.random() < 0.4 * self.expert_noise:
            return call("answer", {"value": self.draw.randint(6, 90)})
        if self.product is None:
            return call("multiply", {"a": self.a, "b": self.b})
        if self.sum is None:
            return call("add", {"a": self.product, "b": self.c})
        return call("answer", {"value": self.sum})
