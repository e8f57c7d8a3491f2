"""Shell completion: scripts for bash, zsh and fish with the commands, their options, and the keys of settings.

A script is made from the parser and the list of settings and holds all of it, so completing starts no Python.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Commands:
    """What can be completed.

    Attributes:
        about: what each command does, by name.
        options: of each command, "--out" and the like with what they do.
        choices: values of an option or argument that has a list of them, by command and option ("" for an argument).
        settings: what each setting does, by key.
        values: of settings that have a list of them, by key.
        with_settings: names of commands that take KEY=VALUE.
    """

    about: Mapping[str, str]
    options: Mapping[str, Mapping[str, str]]
    choices: Mapping[tuple[str, str], Sequence[str]]
    settings: Mapping[str, str]
    values: Mapping[str, Sequence[str]]
    with_settings: tuple[str, ...]


def commands_of(
    parser: argparse.ArgumentParser, settings: Mapping[str, str], values: Mapping[str, Sequence[str]]
) -> Commands:
    """What can be completed of a parser with commands.

    Args:
        settings, values: see `Commands`.
    """
    (added,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    about = {str(one.dest): str(one.help) for one in added._choices_actions}
    options: dict[str, dict[str, str]] = {}
    choices = {}
    for name, command in added.choices.items():
        actions = command._actions
        options[name] = {word: a.help or "" for a in actions for word in a.option_strings if word.startswith("--")}
        for action in actions:
            if action.choices:
                word = next((w for w in action.option_strings if w.startswith("--")), "")
                choices[name, word] = [str(choice) for choice in action.choices]
    takes = tuple(n for n, c in added.choices.items() if any(a.metavar == "KEY=VALUE" for a in c._actions))
    return Commands(about, options, choices, settings, values, takes)


def script(shell: str, commands: Commands) -> str:
    """The completion script of a shell: bash, zsh or fish."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def _choices(commands: Commands, with_option: bool) -> list[tuple[str, str]]:
    """ "command option" and its words, of options or (the option is then empty) of arguments."""
    chosen = (item for item in commands.choices.items() if bool(item[0][1]) == with_option)
    return [(f"{name} {option}", " ".join(found)) for (name, option), found in chosen]


def _bash(commands: Commands) -> str:
    options = "\n".join(f'    {name}) words="{" ".join(found)}" ;;' for name, found in commands.options.items())
    values = "\n".join(f'    {key}) words="{" ".join(found)}" ;;' for key, found in commands.values.items())
    of_options, of_arguments = (
        "\n".join(f'    "{place}") words="{found}" ;;' for place, found in _choices(commands, with_option))
        for with_option in (True, False)
    )
    return f"""\
# rkdo completion for bash: eval "$(rkdo completion bash)"
_rkdo() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}}
  local key='' words=''
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    mapfile -t COMPREPLY < <(compgen -W "{" ".join(commands.about)} --help --version" -- "$cur")
    return
  fi
  # bash takes KEY=VALUE for three words
  if [ "$cur" = "=" ]; then key=$before cur=''; elif [ "$before" = "=" ]; then key=${{COMP_WORDS[COMP_CWORD-2]}}; fi
  if [ -n "$key" ]; then
    case $key in
{values}
    esac
    [ -z "$words" ] || mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
    return
  fi
  case "$command $before" in
{of_options}
  esac
  [ -n "$words" ] || case "$command " in
{of_arguments}
  esac
  if [ -z "$words" ] || [ "${{cur:0:1}}" = "-" ]; then
    case $command in
{options}
    esac
    [ "${{cur:0:1}}" = "-" ] || words=
  fi
  [ -z "$words" ] || mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
  if [ -z "$words" ] && [ -n "$cur" ]; then
    case $command in
    {" | ".join(commands.with_settings)})
      mapfile -t COMPREPLY < <(compgen -S = -W "{" ".join(commands.settings)}" -- "$cur") ;;
    esac
    if [ "${{#COMPREPLY[@]}}" -gt 0 ]; then
      compopt -o nospace 2> /dev/null
      mapfile -t -O "${{#COMPREPLY[@]}}" COMPREPLY < <(compgen -f -- "$cur")
    fi
  fi
}}
complete -o default -F _rkdo rkdo
"""


def _described(words: Mapping[str, str]) -> str:
    return " ".join(shlex.quote(word.replace(":", "\\:") + ":" + about) for word, about in words.items())


def _zsh(commands: Commands) -> str:
    options = "\n".join(f"    {name}) options=({_described(found)}) ;;" for name, found in commands.options.items())
    values = "\n".join(f"    {key}) found=({' '.join(found)}) ;;" for key, found in commands.values.items())
    of_options, of_arguments = (
        "\n".join(f"    '{place}') found=({found}) ;;" for place, found in _choices(commands, with_option))
        for with_option in (True, False)
    )
    return f"""\
#compdef rkdo
# rkdo completion for zsh: eval "$(rkdo completion zsh)", after compinit
_rkdo() {{
  local -a commands options settings found
  commands=({_described(commands.about)})
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  local command=${{words[2]}} before=${{words[CURRENT-1]}}
  if [[ $PREFIX == *.*=* ]]; then
    case ${{PREFIX%%=*}} in
{values}
    esac
    compset -P '*='
    (( $#found )) && compadd -a found || _files
    return
  fi
  case "$command $before" in
{of_options}
  esac
  if (( $#found )); then
    compadd -a found
    return
  fi
  case "$command " in
{of_arguments}
  esac
  (( $#found )) && compadd -a found
  case $command in
{options}
  esac
  [[ $PREFIX == -* ]] && _describe option options
  if [[ " {" ".join(commands.with_settings)} " == *" $command "* && -n $PREFIX ]]; then
    settings=({_described(commands.settings)})
    _describe -t settings setting settings -qS=
  fi
  _files
}}
compdef _rkdo rkdo
"""


def _fish(commands: Commands) -> str:
    lines = ["# rkdo completion for fish: rkdo completion fish | source"]
    for name, about in commands.about.items():
        lines.append(f"complete -c rkdo -n __fish_use_subcommand -f -a {name} -d {shlex.quote(about)}")
    for name, found in commands.options.items():
        seen = f"'__fish_seen_subcommand_from {name}'"
        for option, about in found.items():
            values = commands.choices.get((name, option))
            more = f" -x -a {shlex.quote(' '.join(values))}" if values else ""
            lines.append(f"complete -c rkdo -n {seen} -l {option[2:]} -d {shlex.quote(about)}{more}")
        if (name, "") in commands.choices:
            lines.append(f"complete -c rkdo -n {seen} -f -a {shlex.quote(' '.join(commands.choices[name, '']))}")
    seen = f"'__fish_seen_subcommand_from {' '.join(commands.with_settings)}'"
    for key, about in commands.settings.items():
        words = [f"{key}={value}" for value in commands.values.get(key, [""])]
        lines.append(f"complete -c rkdo -n {seen} -a {shlex.quote(' '.join(words))} -d {shlex.quote(about)}")
    return "\n".join(lines) + "\n"
