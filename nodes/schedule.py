"""The schedules and the stochastic solver that PixArt-alpha and Sigma were published with."""

from __future__ import annotations

from comfy_api.latest import io

from ..pixart_core.sampling import SOLVERS, sa_taus, solver_sigmas, uniform_timesteps
from .host.sa_solver import sa_solver_sampler
from .host.schema import CATEGORY, require_option, schema


class PixArtSchedule(io.ComfyNode):
    """SIGMAS of the published recipes, for the custom sampling nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtSchedule",
            display_name="PixArt Schedule",
            category=f"{CATEGORY}/sampling",
            description="The time-uniform noise levels PixArt-alpha and Sigma are sampled on, "
                        "exactly those of the diffusers pipelines, for DPM-Solver++ and SA-Solver.",
            search_aliases=["pixart scheduler", "pixart sigmas", "time uniform", "linspace",
                            "dpm solver", "sa solver"],
            inputs=[
                io.Combo.Input("solver", options=list(SOLVERS), default=SOLVERS[0],
                               tooltip="dpm-solver++ goes with the stock sampler dpmpp_2m, "
                                       "sa-solver with PixArt SA-Solver."),
                io.Int.Input("steps", default=20, min=1, max=999,
                             tooltip="Sampling steps: 20 for DPM-Solver++ (14 in PixArt's demo), "
                                     "25 for SA-Solver."),
                io.Float.Input("strength", default=1.0, min=0.01, max=1.0, step=0.01,
                               tooltip="How much of the latent is made new: 1 starts from noise "
                                       "alone, lower values keep more of an encoded image."),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas",
                                      tooltip="Goes to a custom sampler.")],
        )

    @classmethod
    def execute(cls, solver, steps, strength) -> io.NodeOutput:
        require_option("solver", solver, SOLVERS)
        return io.NodeOutput(solver_sigmas(uniform_timesteps(steps, strength), solver).float())

    @classmethod
    def validate_inputs(cls, steps=None, strength=None) -> bool | str:
        if steps is None or strength is None:  # by wire: execute says it
            return True
        try:
            uniform_timesteps(steps, strength)
        except ValueError as error:
            return str(error)
        return True


class PixArtSASolver(io.ComfyNode):
    """SAMPLER: SA-Solver as PixArt-alpha's demo runs it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtSASolver",
            display_name="PixArt SA-Solver",
            category=f"{CATEGORY}/sampling",
            description="SA-Solver, the stochastic sampler of PixArt-alpha: predictor and "
                        "corrector of order 2, noise between timesteps 800 and 200. Use it with "
                        "PixArt Schedule, 25 steps, cfg 3.",
            search_aliases=["sa solver", "stochastic adams", "sde"],
            inputs=[
                io.Float.Input("eta", default=1.0, min=0.0, max=10.0, step=0.05,
                               tooltip="How much noise each step replaces: 1 is the published "
                                       "recipe, 0 adds none."),
            ],
            outputs=[io.Sampler.Output(display_name="sampler",
                                       tooltip="Goes to a custom sampler.")],
        )

    @classmethod
    def execute(cls, eta) -> io.NodeOutput:
        sa_taus([], eta)
        return io.NodeOutput(sa_solver_sampler(eta))
