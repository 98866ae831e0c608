/** Light, dark, or as the system has it. */

import { load, save } from './stored';

export type Theme = 'auto' | 'light' | 'dark';

let chosen = $state<Theme>(load<Theme>('theme', 'auto'));

export const theme = {
  get chosen(): Theme {
    return chosen;
  },
};

export function applyTheme(): void {
  document.documentElement.dataset.theme = chosen;
}

export function chooseTheme(next: Theme): void {
  chosen = next;
  save('theme', next);
  applyTheme();
}
