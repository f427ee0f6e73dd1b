"""Diffusion: schedules, training loss, guidance and sampling, over diffusers' schedulers.

Symbols as in DDPM (Ho et al. 2020): x_0 a picture, x_t the same after t steps of noise, eps the
noise, alphas_cumprod (alpha-bar) the share of signal left. Timesteps run from 0 to T - 1.
"""
