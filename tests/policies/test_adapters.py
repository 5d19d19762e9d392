"""The adapter bank: switching, guards, gradients, state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from diffalign.batch import ImageBatch
from diffalign.errors import UserError
from diffalign.policies.adapters import AdapterBank, LoraSettings
from diffalign.policies.base import Policy
from diffalign.policies.fingerprint import fingerprint
from tests.factories import ToyPolicy, image_batch, tiny_policy

FAMILIES = ("sd", "sdxl", "sd3")


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)


def bank(module: nn.Module, *names: str, **settings: object) -> AdapterBank:
    made = AdapterBank(module, lambda: ("0", "2"))
    for seed, name in enumerate(names):
        made.add(name, LoraSettings(rank=2, **settings), seed=seed)  # type: ignore[arg-type]
    return made


def shake(adapters: AdapterBank, name: str, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class TestSwitching:
    def test_new_adapter_changes_nothing(self) -> None:
        module = network()
        before = module(X)
        bank(module, "default")
        assert torch.equal(module(X), before)

    def test_disabled_is_the_bare_network(self) -> None:
        module = network()
        bare = module(X)
        adapters = bank(module, "default")
        shake(adapters, "default")
        assert not torch.equal(module(X), bare)
        with adapters.disabled():
            assert adapters.active is None
            assert torch.equal(module(X), bare)
        assert adapters.active == "default"

    def test_contexts_nest_and_survive_exceptions(self) -> None:
        module = network()
        adapters = bank(module, "default", "other")
        shake(adapters, "default")
        shake(adapters, "other", seed=2)
        default = module(X)
        with adapters.using("other"):
            other = module(X)
            with adapters.disabled():
                bare = module(X)
                with adapters.using("default"):
                    assert torch.equal(module(X), default)
                assert torch.equal(module(X), bare)
            assert torch.equal(module(X), other)
        assert torch.equal(module(X), default)
        with pytest.raises(KeyError), adapters.disabled(), adapters.using("other"):
            raise KeyError
        assert adapters.active == "default"
        assert torch.equal(module(X), default)

    def test_activate_stays(self) -> None:
        module = network()
        adapters = bank(module, "default", "other")
        shake(adapters, "other")
        adapters.activate("other")
        changed = module(X)
        with adapters.using("default"):
            pass
        assert torch.equal(module(X), changed)

    def test_switching_never_touches_requires_grad(self) -> None:
        adapters = bank(network(), "default", "other")
        adapters.add("frozen", LoraSettings(rank=2), trainable=False)
        for context in (adapters.disabled(), adapters.using("frozen"), adapters.using("other")):
            with context:
                assert all(p.requires_grad for name in ("default", "other") for p in adapters.parameters(name))
                assert not any(p.requires_grad for p in adapters.parameters("frozen"))

    def test_no_adapters_on_a_frozen_network(self) -> None:
        module = network().requires_grad_(False)
        with AdapterBank(module).disabled():
            assert module(X).shape == (3, 4)

    def test_no_adapters_on_a_training_network_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="FrozenCopy"), AdapterBank(network()).disabled():
            pass


class TestWeights:
    def test_trainables_are_float32_and_the_base_is_frozen(self) -> None:
        module = network(torch.bfloat16)
        adapters = bank(module, "default")
        assert {p.dtype for p in adapters.parameters()} == {torch.float32}
        assert {id(p) for p in module.parameters() if p.requires_grad} == {id(p) for p in adapters.parameters()}

    def test_seed_decides_and_the_global_generator_is_left_alone(self) -> None:
        state = torch.get_rng_state()
        prints = []
        for seed in (1, 1, 2):
            adapters = AdapterBank(network(), lambda: ("0",))
            torch.set_rng_state(state)
            adapters.add("default", seed=seed)
            assert torch.equal(torch.get_rng_state(), state)
            prints.append(adapters.fingerprint())
        assert prints[0] == prints[1] != prints[2]

    def test_state_round_trip(self) -> None:
        first, second = bank(network(), "default"), bank(network(), "default")
        shake(first, "default")
        state = {key: value.clone() for key, value in first.state_dict().items()}
        assert sorted(state)[0] == "0.lora_A.weight"
        second.load_state_dict("default", {key: value.double() for key, value in state.items()})
        assert second.fingerprint() == first.fingerprint()
        assert {p.dtype for p in second.parameters()} == {torch.float32}

    def test_misfit_is_named(self) -> None:
        adapters = bank(network(), "default")
        other = AdapterBank(network(), lambda: ("0", "2"))
        other.add("default", LoraSettings(rank=3))
        with pytest.raises(UserError, match="rank 2"):
            adapters.load_state_dict("default", other.state_dict())
        with pytest.raises(UserError, match="missing"):
            adapters.load_state_dict("default", {})

    def test_copy_makes_a_frozen_twin(self) -> None:
        adapters = bank(network(), "default", dropout=0.5)
        shake(adapters, "default")
        adapters.copy("default", "twin")
        assert adapters.fingerprint("twin") == adapters.fingerprint("default")
        assert not any(p.requires_grad for p in adapters.parameters("twin"))
        assert adapters.settings("twin").dropout == 0.0
        shake(adapters, "default", seed=5)
        assert adapters.fingerprint("twin") != adapters.fingerprint("default")

    def test_fingerprint_sees_values_scale_and_names(self) -> None:
        value = torch.arange(5.0)
        assert fingerprint([("a", value)]) == fingerprint([("a", value.clone())])
        assert len({fingerprint([("a", value)]), fingerprint([("b", value)]), fingerprint([("a", value + 1)])}) == 3
        assert fingerprint([("a", value)], "1") != fingerprint([("a", value)], "2")
        assert fingerprint([("a", value), ("b", value)]) == fingerprint([("b", value), ("a", value)])

    def test_alpha_scales(self) -> None:
        outputs = []
        for alpha in (0, 2, 4):
            module = network()
            adapters = bank(module, "default", alpha=alpha)
            shake(adapters, "default")
            outputs.append(module[0](X) - module[0].base_layer(X))  # type: ignore[operator]
        assert torch.equal(outputs[0], outputs[1])
        torch.testing.assert_close(outputs[2], 2 * outputs[1])

    def test_embeddings_and_transformers_models(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
        model = LlamaForCausalLM(config)
        adapters = AdapterBank(model, lambda: ("q_proj", "embed_tokens"))
        ids = torch.arange(4)[None]
        bare = model(ids).logits
        adapters.add("default", LoraSettings(rank=2))
        shake(adapters, "default")
        assert not torch.equal(model(ids).logits, bare)
        with adapters.disabled():
            assert torch.equal(model(ids).logits, bare)
        assert "model.embed_tokens.lora_embedding_A" in adapters.state_dict()
        adapters.load_state_dict("default", adapters.state_dict())


class TestMistakes:
    def test_unknown_target_offers_the_nearest(self) -> None:
        policy = tiny_policy("sd")
        with pytest.raises(UserError, match="to_q"):
            policy.adapters.add("default", LoraSettings(targets=("too_q",)))
        assert policy.adapters.names == ()

    def test_names(self) -> None:
        adapters = bank(network(), "default")
        with pytest.raises(UserError, match="did you mean 'default'"), adapters.using("defualt"):
            pass
        for name in ("default", "a.b"):
            with pytest.raises(UserError, match="taken or holds a dot"):
                adapters.add(name)

    def test_no_targets(self) -> None:
        with pytest.raises(UserError, match="needs targets"):
            AdapterBank(network()).add("default")


def predict(policy: Policy, batch: ImageBatch) -> Tensor:
    timesteps = policy.process.timestep_at(torch.tensor([100, 700]).repeat(batch.images_per_example))
    return policy.predict(batch.latents, timesteps, batch.condition)


def prepared(family: str, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> tuple[Policy, ImageBatch]:
    policy = tiny_policy(family, lora=True)
    batch = image_batch(policy)
    for part in policy.parts:
        part.to(dtype)
    for parameter in policy.adapters.parameters():
        parameter.data = parameter.data.float()
    policy.module.train()
    if checkpointing:
        policy.enable_gradient_checkpointing()
    return policy, batch


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
class TestPolicies:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_fresh_policy_equals_reference_bit_for_bit(
        self, family: str, dtype: torch.dtype, checkpointing: bool
    ) -> None:
        policy, batch = prepared(family, dtype, checkpointing)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = predict(policy, batch)
            with torch.no_grad(), policy.adapters.disabled():
                reference = predict(policy, batch)
        assert output.requires_grad
        assert torch.equal(output, reference)

    def test_gradients_do_not_depend_on_the_order_of_passes(self, family: str, checkpointing: bool) -> None:
        gradients = []
        for order in ("alone", "policy first", "reference first"):
            policy, batch = prepared(family, checkpointing=checkpointing)
            shake(policy.adapters, "default")

            def reference(policy: Policy = policy, batch: ImageBatch = batch) -> None:
                with torch.no_grad(), policy.adapters.disabled():
                    predict(policy, batch)

            if order == "reference first":
                reference()
            output = predict(policy, batch)
            if order == "policy first":
                reference()
            output.square().mean().backward()
            trained = {id(p) for p in policy.adapters.parameters()}
            assert all(p.grad is None for p in policy.module.parameters() if id(p) not in trained)
            gradients.append([p.grad for p in policy.adapters.parameters()])
        for other in gradients[1:]:
            assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))  # type: ignore[arg-type]
        assert all(g is not None for g in gradients[0])
        assert sum(g.abs().sum() > 0 for g in gradients[0] if g is not None) > len(gradients[0]) / 2

    def test_backward_in_a_wrong_state_raises(self, family: str, checkpointing: bool) -> None:
        policy, batch = prepared(family, checkpointing=checkpointing)
        policy.adapters.add("other", LoraSettings(rank=2))
        loss = predict(policy, batch).square().mean()
        with policy.adapters.disabled():
            with pytest.raises(RuntimeError, match="switched off"):
                policy.adapters.assert_ready_for_backward()
            with pytest.raises(RuntimeError, match="switched off"):
                loss.backward()
        loss = predict(policy, batch).square().mean()
        with (
            policy.adapters.using("other"),
            pytest.raises(RuntimeError, match="'other' of a pass made under 'default'"),
        ):
            loss.backward()
        predict(policy, batch).square().mean().backward()
        policy.adapters.assert_ready_for_backward()
        assert all(p.grad is not None for p in policy.adapters.parameters("default"))


def test_gradients_with_and_without_checkpointing_agree() -> None:
    gradients = []
    for checkpointing in (False, True):
        policy, batch = prepared("sd", checkpointing=checkpointing)
        shake(policy.adapters, "default")
        predict(policy, batch).square().mean().backward()
        gradients.append([p.grad for p in policy.adapters.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_second_adapter_trains_under_its_own_name() -> None:
    policy, batch = prepared("sd")
    policy.adapters.add("other", LoraSettings(rank=2), seed=3)
    with policy.adapters.using("other"):
        predict(policy, batch).square().mean().backward()
    assert all(p.grad is None for p in policy.adapters.parameters("default"))
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.adapters.parameters("other"))


def test_inference_finds_adapters_made_meanwhile_and_returns_every_mode() -> None:
    policy = tiny_policy("sd")
    for name in ("default", "other"):
        policy.adapters.add(name, LoraSettings(rank=2, dropout=0.5), seed=0)
        policy.module.train()
        policy.module.conv_in.eval()
        before = {path: part.training for path, part in policy.module.named_modules()}
        with policy.inference():
            assert not any(part.training for part in policy.module.modules())
            assert not torch.is_grad_enabled()
        assert {path: part.training for path, part in policy.module.named_modules()} == before


def test_modules_are_looked_up_again_only_where_adapters_changed_them() -> None:
    policy = tiny_policy("sd")

    def looked_up() -> list[nn.Module]:
        found = policy._modules()
        assert set(found) == set(policy.module.modules())
        return found

    bare = looked_up()
    with policy.inference():
        assert looked_up() is bare
    policy.adapters.add("default", LoraSettings(rank=2, dropout=0.5))
    adapted = looked_up()
    assert len(adapted) > len(bare)
    with policy.adapters.disabled():
        assert looked_up() is adapted
    policy.adapters.merge("default")
    policy.adapters.add("default", LoraSettings(rank=4))  # the same name, other modules
    assert looked_up() is not adapted
    other = policy.with_module(copy.deepcopy(policy.module))
    assert set(other._modules()) == set(other.module.modules())
    assert set(policy._modules()).isdisjoint(other._modules())


def test_toy_policy_behaves_like_a_real_one() -> None:
    policy = ToyPolicy()
    batch = image_batch(policy)
    with torch.no_grad(), policy.adapters.disabled():
        reference = predict(policy, batch)
    output = predict(policy, batch)
    assert torch.equal(output, reference)
    output.square().mean().backward()
    (delta,) = policy.adapters.parameters()
    times = torch.tensor([100, 700]).repeat(2) / 1000
    text = batch.condition.tensors["prompt_embeds"].flatten(1).mean(dim=1)
    by_hand = torch.stack(
        [(2 * output * batch.latents).mean(), (2 * output * (text * times)[:, None, None, None]).mean()]
    )
    assert delta.grad is not None
    torch.testing.assert_close(delta.grad, by_hand.detach())
    shake(policy.adapters, "default")
    with policy.adapters.disabled(), pytest.raises(RuntimeError, match="switched off"):
        output.sum().backward()
